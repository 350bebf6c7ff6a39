"""Disaggregated serving: prefill on one worker, decode on another, and what routers know of the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The router's annotations on a request that a decode worker should prefill itself.
_BYPASS: Final = frozenset({"bypass-remote-prefill", "x-bypass-remote-prefill"})
_NEEDS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {"prefill": (("decode",),), "decode": (("prefill",),)}


class Role:
    """The share of each request that a worker does.

    :ivar mode: ``aggregated``, ``prefill`` or ``decode``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def prepare(self, request: Mapping[str, Any], translated: Any) -> None:
        """Fit a translated request to this worker's share; here nothing is left out.

        :raises InvalidRequestError: the request cannot be disaggregated.
        """

    @property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """The types of worker without which this one cannot serve, as in :class:`~dynamo_worker.EngineInfo`."""
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
