"""What the kit has to know of an engine to test it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Subject:
    """An engine as the kit sees it: how it is started, and what is known of it while it runs.

    :param engine: its name, that of ``--engine``.
    :param flags: its own flags.
    :param model: name clients ask for.
    :param start_seconds: most time until a worker serves.
    :param processes: the engine's processes whose death or standstill is fatal: a name for the test, and a pattern
        that matches exactly one command line below the worker.
    :param stream_tokens: tokens of a stream that lasts several seconds, longer than the grace period of the tests.
    :param streams: streams at once.
    :param expected: returns the exact text of an answer for a prompt and a number of tokens, for engines whose output
        is known; None checks the end of the stream only.
    :param start_stages: patterns of lines in the log that mark how far a start has come; a stop at each must work.
    :param stall_timeout: seconds in which a standstill must be noticed.
    :param patience: factor on all time limits.
    """

    engine: str
    flags: Sequence[str] = ()
    model: str = "echo"
    start_seconds: float = 60.0
    processes: Mapping[str, str] = field(default_factory=dict)
    stream_tokens: int = 300
    streams: int = 8
    expected: Callable[[str, int], str] | None = None
    start_stages: Sequence[str] = ()
    stall_timeout: float = 5.0
    patience: float = 3.0

    @property
    def args(self) -> list[str]:
        """The arguments that every worker is started with."""
        return ["--engine", self.engine, *self.flags]
