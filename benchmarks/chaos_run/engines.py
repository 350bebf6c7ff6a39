"""The engines of the fleet: the echo engine in its kinds, and real ones with a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chaos_run.clients import Model, echo
from chaos_run.fleet import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

#: Tokens per second of each stream of the echo engine: long answers last ten seconds.
_RATE: Final = ("--tokens-per-second", "40")
_PROCESSES: Final = {"core": r"echo_process:Core", "rank": r"echo_process rank"}
_TOKENS: Final = Model("echo", 0.7, echo)
_TEXT: Final = Model("echo-text", 0.3, echo)


def _in_process() -> Engine:
    return Engine("in-process", ("--engine", "echo", *_RATE), _TOKENS)


def _process() -> Engine:
    return Engine("process", ("--engine", "echo", "--process-tree", *_RATE), _TOKENS, _PROCESSES)


def _text() -> Engine:
    flags = ("--engine", "echo", "--text", "--process-tree", "--model-name", "echo-text", *_RATE)
    return Engine("text", flags, _TEXT, _PROCESSES, moves=False)


#: Every engine by the name that the command line has for it.
ENGINES: Final[dict[str, Callable[[], Engine]]] = {"in-process": _in_process, "process": _process, "text": _text}
