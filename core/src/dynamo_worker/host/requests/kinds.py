"""The kinds of requests: what the worker checks, and what its frontends can do with a request that breaks off.

The kind is chosen once, when the engine has started. A kind hands out functions that the request path calls, or the
engine's own ones unchanged: what a kind does not check costs no other kind anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from dynamo_worker.errors import UsageError
from dynamo_worker.host.requests.embedding_kind import ENDPOINT_TYPE, EmbeddingRequests
from dynamo_worker.host.requests.text_kind import TextRequests
from dynamo_worker.host.requests.token_kind import TokenRequests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_worker.engine import EngineInfo, Generate, Push
    from dynamo_worker.host.requests.engine_checks import EngineChecks


class FirstAnswer(Protocol):
    """Checks the chunks of the engine's first answer."""

    def take(self, chunk: object) -> None:
        """Check the next chunk.

        :raises StartError: no frontend could use it.
        """

    def end(self) -> None:
        """Check that the answer was complete.

        :raises StartError: it was not.
        """


class RequestKind(Protocol):
    """One kind of request."""

    @property
    def name(self) -> str:
        """What it asks for or takes, in messages."""

    @property
    def migrates(self) -> bool:
        """Whether a frontend can continue such a request on another worker."""

    def checked(self, request: Any) -> Any:
        """Return a request that the engine can rely on.

        :raises InvalidRequestError: it is invalid.
        :raises OtherKindError: it is a request of another kind.
        """

    def guarded(self, generate: Generate) -> Generate:
        """Return what answers requests in the place of an engine's ``generate``; the same function if it will do."""

    def guarded_push(self, push: Push) -> Push:
        """Return what answers requests in the place of an engine's ``push``."""

    def first_answer(self, checks: EngineChecks, request: Mapping[str, Any]) -> FirstAnswer:
        """Return the check of the engine's answer to its canary request."""


def require_router(info: EngineInfo, router_mode: str) -> None:
    """Check that frontends can route the requests of an engine.

    :raises UsageError: they cannot: the model would never be listed, for a reason that only their log says (measured).
    """
    takes = "makes embeddings" if info.embeddings is not None else "takes text" if info.model_input == TEXT else None
    if takes is not None and router_mode == "kv":
        raise UsageError(
            f"--router-mode kv: the engine {takes}, and KV-aware routing needs prompts of tokens: frontends would "
            f"refuse the model {info.model_name!r}",
            hint="choose another --router-mode (DYN_ROUTER_MODE)",
        )


def kind_of(info: EngineInfo, checks: EngineChecks) -> RequestKind:
    """Return the kind of an engine's requests.

    :param info: the information to be registered.
    :raises StartError: there is no such kind, or it does not serve one of the endpoint types.
    """
    if info.model_input not in MODEL_INPUTS:
        raise checks.problem(
            f"start returned an EngineInfo with model_input: expected one of {', '.join(MODEL_INPUTS)}, "
            f"got {info.model_input!r:.80}"
        )
    if info.embeddings is not None:
        if tuple(info.endpoint_types) != (ENDPOINT_TYPE,):
            raise checks.problem(
                f"it makes embeddings, which are served for {ENDPOINT_TYPE} only, not for "
                f"{', '.join(info.endpoint_types)}"
            )
        return EmbeddingRequests(info.embeddings, info)
    if info.model_input == TOKENS:
        return TokenRequests(info.vocab_size, info.context_length)
    unknown = sorted({*info.endpoint_types} - {*TextRequests.ENDPOINT_TYPES})
    if unknown:
        raise checks.problem(
            f"it takes text, which is served for {' and '.join(TextRequests.ENDPOINT_TYPES)} only, "
            f"not for {', '.join(unknown)}"
        )
    return TextRequests(info.endpoint_types, info.vocab_size, info.context_length)


#: The values of ``EngineInfo.model_input``: members of ``dynamo.llm.ModelInput`` in lower case.
TOKENS: Final = "tokens"
TEXT: Final = "text"
MODEL_INPUTS: Final[Sequence[str]] = (TOKENS, TEXT)
