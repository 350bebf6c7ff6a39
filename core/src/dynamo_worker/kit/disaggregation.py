"""Prefill on one worker, decode on another: what the two are to routers, whatever the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The router's mark on a request that a decode worker shall prefill itself, in either spelling.
_BYPASS: Final = frozenset({"bypass-remote-prefill", "x-bypass-remote-prefill"})
_NEEDS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {"prefill": (("decode",),), "decode": (("prefill",),)}


class Role:
    """The share of a request that a worker does.

    :ivar mode: ``aggregated``, ``prefill`` or ``decode``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    @property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """The workers without which this one cannot serve."""
        return _NEEDS.get(self.mode, ())

    @property
    def endpoint_types(self) -> tuple[str, ...]:
        """The OpenAI surfaces: nobody but a router asks a prefill worker."""
        return ("prefill",) if self.mode == "prefill" else ("chat", "completions")

    @staticmethod
    def bypasses_prefill(request: Mapping[str, Any]) -> bool:
        """Return whether a decode worker shall prefill this request itself."""
        annotations = request.get("annotations")
        return isinstance(annotations, list) and any(isinstance(mark, str) and mark in _BYPASS for mark in annotations)
