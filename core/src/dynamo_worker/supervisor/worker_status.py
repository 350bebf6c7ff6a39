"""The worker's status, as its control messages report it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Mapping

#: States of a worker that is ending, whether it was asked to or not.
ENDING: Final = frozenset({State.UNREGISTERING, State.GRACE, State.DRAINING, State.CLEANUP, State.FATAL})

#: States in which the worker's event loop has to prove that it is responsive.
_WATCHED: Final = frozenset({State.SERVING, State.UNREGISTERING, State.GRACE, State.DRAINING})

_MOST_CHARACTERS: Final = 2000


class WorkerStatus:
    """The last reported status of one worker. Invalid values are ignored: a library may write to the socket.

    :param now: when the worker started (monotonic).
    :param grace_period: the termination grace period in seconds, until the worker announces its own.
    :param termination_message_path: the file for Kubernetes' termination message, likewise.
    """

    def __init__(self, now: float, grace_period: float, termination_message_path: str) -> None:
        self.state = State.STARTING
        #: When to kill the worker if it is still in this state (monotonic).
        self.deadline: float | None = None
        #: Requests in flight.
        self.in_flight = 0
        #: The phase of a drain on request; empty while it takes part in none.
        self.drain = ""
        #: Whether it has ever served.
        self.has_served = False
        self.grace_period = grace_period
        self.termination_message_path = termination_message_path
        #: ``text`` or ``json``; None until the worker has announced it.
        self.log_format: str | None = None
        #: Seconds without a message after which the worker is unresponsive; 0: never.
        self.heartbeat_timeout = 0.0
        #: When the last message came (monotonic).
        self.last_beat = now
        #: Why it is ending.
        self.reason = ""
        #: The exit code that it has announced.
        self.exit_code: int | None = None
        #: The name of the error that it has announced.
        self.error = ""
        #: Whether it has announced its end.
        self.said_farewell = False

    def take(self, message: Mapping[str, Any], now: float) -> bool:
        """Update the record from one message of any type; return whether it announced a state.

        :param now: when it came (monotonic).
        """
        self.last_beat = now
        kind = message["type"]
        if kind == "state":
            return self._take_state(message)
        if kind == "heartbeat":
            self.in_flight = _count(message.get("in_flight"))
        elif kind == "settings":
            self._take_settings(message)
        elif kind == "exit":
            code = message.get("code")
            self.said_farewell = True
            self.exit_code = code if type(code) is int and 0 <= code < 256 else None
            self.reason = _text(message.get("reason"))
            self.error = _text(message.get("error"))
        return False

    def _take_state(self, message: Mapping[str, Any]) -> bool:
        try:
            self.state = State(message.get("state"))
        except ValueError:
            return False
        self.deadline = _number(message.get("deadline"))
        self.in_flight = _count(message.get("in_flight"))
        phase = _text(message.get("drain"))
        self.drain = "" if phase == "serving" else phase
        self.has_served = self.has_served or self.state is State.SERVING
        if self.state is State.FATAL and not self.reason:
            self.reason = _text(message.get("reason"))
            self.error = _text(message.get("error"))
        return True

    def _take_settings(self, message: Mapping[str, Any]) -> None:
        self.grace_period = _number(message.get("termination_grace_period")) or self.grace_period
        self.heartbeat_timeout = _number(message.get("heartbeat_timeout")) or 0.0
        path = message.get("termination_message_path")
        if isinstance(path, str) and path:
            self.termination_message_path = path
        if message.get("log_format") in ("text", "json"):
            self.log_format = message["log_format"]

    @property
    def never_served(self) -> bool:
        """Whether it has not served yet, so that a stop interrupts its start."""
        return self.state is State.STARTING or (self.state is State.CLEANUP and not self.has_served)

    @property
    def beat_due(self) -> float | None:
        """When the next message becomes overdue (monotonic); None while the event loop may block."""
        if self.heartbeat_timeout <= 0 or self.state not in _WATCHED:
            return None
        return self.last_beat + self.heartbeat_timeout


def positive(text: str, default: float) -> float:
    """Return a setting that is a positive number of seconds, or the default if it is anything else."""
    try:
        return _number(float(text)) or default
    except ValueError:
        return default


def _number(value: object) -> float | None:
    """Return a finite number that is not negative, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        return None
    return float(value)


def _count(value: object) -> int:
    return int(_number(value) or 0)


def _text(value: object) -> str:
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else ""
