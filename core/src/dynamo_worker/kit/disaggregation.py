"""Disaggregated serving: prefill on one worker, decode on another, and what workers tell routers about their role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.canary import is_canary
from dynamo_worker.kit.fields import section, token_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.engine import Send
    from dynamo_worker.responses import Chunk, PromptTokensDetails

#: The router's annotations on a request that the decode worker should prefill itself.
_BYPASS: Final = frozenset({"bypass-remote-prefill", "x-bypass-remote-prefill"})
_NEEDS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {"prefill": (("decode",),), "decode": (("prefill",),)}


class Role:
    """The phase of each request that a worker runs.

    :ivar mode: ``aggregated``, ``prefill`` or ``decode``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def prepare(self, request: Mapping[str, Any], translated: Any) -> None:
        """Adapt a translated request to this worker's phase; an aggregated worker changes nothing.

        A canary concerns no other worker: both of its phases run here, and nobody would fetch its blocks.

        :raises InvalidRequestError: the request cannot be disaggregated.
        """
        if self.mode == "aggregated" or is_canary(request):
            return
        if self.mode == "prefill":
            if translated.n > 1:
                raise InvalidRequestError("sampling_options.n: a prefill worker makes only one answer")
            self.prepare_prefill(translated)
        elif not self.bypasses_prefill(request):
            self.prepare_decode(translated, section(request, "prefill_result", "disaggregated_params"))

    def prepare_prefill(self, translated: Any) -> None:
        """Tell the engine to stop after the prefill, and to keep its result."""

    def prepare_decode(self, translated: Any, handed_over: Mapping[str, Any]) -> None:
        """Tell the engine where to fetch the result of the prefill.

        :param handed_over: what the prefill worker has sent; empty if it has sent nothing.
        :raises InvalidRequestError: that is not enough.
        """

    def with_prefill_usage(self, request: Mapping[str, Any], send: Send) -> Send:
        """Return what sends the chunks of a decode worker with the prefill worker's count of cached tokens.

        The engine here counts whatever the prefill worker has handed over as cached.

        :param send: takes the chunks; returned itself if no prefill worker took part.
        :raises InvalidRequestError: the count is not one.
        """
        result = section(request, "prefill_result")
        if self.mode != "decode" or not result or is_canary(request) or self.bypasses_prefill(request):
            return send
        cached = section(request, "prefill_result", "prompt_tokens_details").get("cached_tokens")
        if cached is not None:
            cached = token_count("prefill_result.prompt_tokens_details.cached_tokens", cached)

        details: PromptTokensDetails | None = {"cached_tokens": cached} if cached else None

        def send_with_usage(chunk: Chunk) -> None:
            usage = chunk.get("completion_usage")
            if usage is not None:
                usage["prompt_tokens_details"] = details
            send(chunk)

        return send_with_usage

    @property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """The types of workers that this one cannot serve without, as in :class:`~dynamo_worker.EngineInfo`."""
        return _NEEDS.get(self.mode, ())

    @property
    def endpoint_types(self) -> tuple[str, ...]:
        """The OpenAI APIs it serves; only routers send requests to a prefill worker."""
        return ("prefill",) if self.mode == "prefill" else ("chat", "completions")

    @staticmethod
    def bypasses_prefill(request: Mapping[str, Any]) -> bool:
        """Return whether the router asks a decode worker to prefill this request itself."""
        annotations = request.get("annotations")
        return isinstance(annotations, list) and any(isinstance(mark, str) and mark in _BYPASS for mark in annotations)
