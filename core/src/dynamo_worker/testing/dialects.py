"""Requests and answers of the checks, in the form that an engine takes and gives: tokens or text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_worker.engine import EngineInfo

    CheckT = TypeVar("CheckT")

#: Names of OpenAI's API for fields of Dynamo's requests.
_RENAMED = {"guided_decoding": "response_format"}


class Dialect(Protocol):
    """How one kind of request is made, and its answers read."""

    @property
    def model_input(self) -> str:
        """The engine's ``EngineInfo.model_input``."""

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary.

        :param tokens: ``max_tokens``.
        :param prompt: different numbers have different prompts; 0 is the canary's.
        :param sections: more fields, by section of Dynamo's request.
        """

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with a prompt that is longer by so many tokens."""

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to; None if it has nothing of an answer."""

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""

    def content(self, chunks: Sequence[Any], index: int) -> Any:
        """Return what one answer says: its tokens or its text."""

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the token counts of an answer; None if it has none."""

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of an answer's tokens."""

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:
        """Return the number of a prompt's tokens; None if only the engine can tell."""


class Tokens:
    """Dynamo's own requests and chunks."""

    model_input = "tokens"

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary."""
        request = dict(canary)
        if prompt:
            request["token_ids"] = _prompt(list(canary["token_ids"]), prompt, info)
        given: dict[str, Mapping[str, Any]] = {
            **sections,
            "stop_conditions": {"max_tokens": tokens, "ignore_eos": True, **sections.get("stop_conditions", {})},
        }
        for section, values in given.items():
            request[section] = {**(request.get(section) or {}), **values}
        return request

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with the first token of its prompt so many times more."""
        prompt = request["token_ids"]
        return {**request, "token_ids": [*([prompt[0]] * tokens), *prompt]}

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""
        return (request.get("stop_conditions") or {}).get("max_tokens")

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to."""
        return chunk.get("index") or 0

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""
        return chunk.get("finish_reason")

    def content(self, chunks: Sequence[Any], index: int) -> list[int]:
        """Return the tokens of one answer."""
        mine = [chunk for chunk in chunks if isinstance(chunk, dict) and self.index(chunk) == index]
        return [token for chunk in mine for token in chunk.get("token_ids") or ()]

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the token counts in the last chunk."""
        last = chunks[-1] if chunks else None
        return last.get("completion_usage") if isinstance(last, dict) else None

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of tokens in the first answer."""
        return len(self.content(chunks, 0))

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:
        """Return the number of a prompt's tokens."""
        return len(request["token_ids"])


def _prompt(canary: list[int], number: int, info: EngineInfo | None) -> list[int]:
    """Return a prompt of its own for each number: the canary's, with other tokens in front."""
    first = max(canary[0], 3)
    limit = info.vocab_size if info is not None and info.vocab_size else first + 100
    room = max(1, min(limit, 250) - first)
    return [first + (number * 11 + at * 3) % room for at in range(5)] + canary[1:]


class Text:
    """Requests and chunks of OpenAI's APIs; without a stream, so that token counts come unasked."""

    model_input = "text"

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,  # noqa: ARG002 - any dialect
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary; the fields of all sections lie beside each other."""
        request = {name: value for name, value in copy.deepcopy(dict(canary)).items() if name not in _LIMITS}
        request |= {"stream": False, "max_tokens": tokens}
        request.pop("stream_options", None)
        if prompt:
            words = "".join(chr(ord("a") + (prompt * 11 + at * 3) % 26) for at in range(5))
            if "messages" in request:
                request["messages"][-1] = {**request["messages"][-1], "content": words}
            else:
                request["prompt"] = words
        for values in sections.values():
            request |= {_RENAMED.get(name, name): value for name, value in values.items()}
        return request

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with so many words more; a word is a token or more."""
        longer = copy.deepcopy(dict(request))
        words = "word " * tokens
        if "messages" in longer:
            longer["messages"][-1]["content"] = f"{words}{longer['messages'][-1]['content']}"
        else:
            longer["prompt"] = f"{words}{longer['prompt']}"
        return longer

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""
        return next((request[name] for name in _LIMITS if request.get(name) is not None), None)

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to; None for one with token counts only."""
        return next((choice.get("index") for choice in _choices(chunk)), None)

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""
        return next((c["finish_reason"] for c in _choices(chunk) if c.get("finish_reason") is not None), None)

    def content(self, chunks: Sequence[Any], index: int) -> str:
        """Return the text of one answer."""
        return "".join(self.texts(chunks, index))

    def texts(self, chunks: Sequence[Any], index: int = 0) -> list[str]:
        """Return the text of each chunk of one answer that has some."""
        found = []
        for choice in (choice for chunk in chunks for choice in _choices(chunk) if choice.get("index") == index):
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("reasoning_content") or delta.get("content")
            if isinstance(text, str) and text:
                found.append(text)
        return found

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the last token counts."""
        counts = [chunk["usage"] for chunk in chunks if isinstance(chunk, dict) and chunk.get("usage")]
        return counts[-1] if counts else None

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of tokens that the engine has counted; skip the check if it has not."""
        usage = self.usage(chunks)
        if not isinstance(usage, dict) or type(usage.get("completion_tokens")) is not int:
            if any(self.reason(chunk) is not None for chunk in chunks if isinstance(chunk, dict)):
                pytest.skip("the engine reports no usage")
            return 0
        made: int = usage["completion_tokens"]
        return made

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:  # noqa: ARG002 - any dialect
        """Return None: only the engine can tell."""
        return None


#: Where a text request has its ``max_tokens``.
_LIMITS = ("max_completion_tokens", "max_tokens")


def _choices(chunk: Any) -> list[dict[str, Any]]:
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def dialect_of(request: Mapping[str, Any]) -> Dialect:
    """Return the dialect of a request, such as an engine's canary."""
    return Tokens() if "token_ids" in request else Text()


def only(model_input: str) -> Callable[[CheckT], CheckT]:
    """Mark a check, or a class of checks, that concerns engines with this ``EngineInfo.model_input`` only."""

    def mark(check: CheckT) -> CheckT:
        for part in vars(check).values() if isinstance(check, type) else [check]:
            if callable(part):
                part.model_input = model_input
        return check

    return mark


def skip_others(check: Any, dialect: Dialect) -> None:
    """Skip a check that does not concern an engine of this dialect."""
    wanted = getattr(check, "model_input", dialect.model_input)
    if wanted != dialect.model_input:
        pytest.skip(f"the engine takes {dialect.model_input}")
