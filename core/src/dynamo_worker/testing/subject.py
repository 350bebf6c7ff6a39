"""The description of an engine under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Subject:
    """Describes an engine to the test kit: how to start it, and what to expect from it.

    :param engine: its name, as passed to ``--engine``.
    :param flags: its own flags.
    :param model: the model name that clients send.
    :param start_seconds: longest time in seconds until a worker is ready.
    :param processes: the engine's processes whose death or stall is fatal: a name for the test, and a pattern that
        matches the command line of exactly one process below the worker.
    :param stream_tokens: number of tokens in a stream that lasts several seconds, longer than the tests' grace period.
    :param streams: number of concurrent streams.
    :param expected: returns the exact answer to a prompt for a number of tokens; None if the output is not
        predictable, in which case only the end of each stream is checked.
    :param start_stages: patterns of log lines that mark the stages of startup; the worker is stopped at each.
    :param stall_timeout: longest time in seconds until a stall is detected.
    :param migrates: whether frontends continue its requests on another worker: False for an engine that takes text.
    :param patience: factor applied to all time limits.
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
    migrates: bool = True

    @property
    def args(self) -> list[str]:
        """The arguments with which every worker starts."""
        return ["--engine", self.engine, *self.flags]
