"""The life of a worker as data: its states, the events that move it, and the table of all transitions."""

from __future__ import annotations

import enum
from typing import Final


class State(str, enum.Enum):
    """Where a worker is in its life. The value is what logs, metrics and the supervisor see."""

    #: The runtime is up, the engine starts; not ready.
    STARTING = "STARTING"
    #: The model is registered and requests are answered.
    SERVING = "SERVING"
    #: A stop was asked for: every endpoint leaves discovery.
    UNREGISTERING = "UNREGISTERING"
    #: Out of discovery, still serving what routers send.
    GRACE = "GRACE"
    #: New requests are refused, those in flight finish or are handed off.
    DRAINING = "DRAINING"
    #: The `cleanup` hooks run, one after another.
    CLEANUP = "CLEANUP"
    #: Beyond repair: leave discovery, hand off, last words, clean up, exit.
    FATAL = "FATAL"
    #: Nothing runs any more; the process ends.
    STOPPED = "STOPPED"

    def __str__(self) -> str:
        return self.value


class Event(str, enum.Enum):
    """What moves a worker from one state to the next."""

    #: The engine is up and warm, and the model is registered.
    ENGINE_READY = "ENGINE_READY"
    #: The engine or the runtime could not start.
    START_FAILED = "START_FAILED"
    #: First signal: stop gracefully.
    STOP_REQUESTED = "STOP_REQUESTED"
    #: Second signal: stop within seconds.
    FORCE_STOP_REQUESTED = "FORCE_STOP_REQUESTED"
    #: The engine, the runtime or discovery is lost.
    FATAL_ERROR = "FATAL_ERROR"
    #: Every endpoint has left discovery, or the time for it is up.
    UNREGISTERED = "UNREGISTERED"
    #: The grace period is over.
    GRACE_OVER = "GRACE_OVER"
    #: Nothing is in flight any more, or the drain budget is used up.
    DRAINED = "DRAINED"
    #: All `cleanup` hooks ended or ran out of time.
    CLEANED_UP = "CLEANED_UP"

    def __str__(self) -> str:
        return self.value


_MOVES: Final[dict[tuple[State, Event], State]] = {
    (State.STARTING, Event.ENGINE_READY): State.SERVING,
    (State.STARTING, Event.START_FAILED): State.FATAL,
    (State.STARTING, Event.STOP_REQUESTED): State.CLEANUP,
    (State.STARTING, Event.FORCE_STOP_REQUESTED): State.CLEANUP,
    (State.STARTING, Event.FATAL_ERROR): State.FATAL,
    (State.SERVING, Event.STOP_REQUESTED): State.UNREGISTERING,
    (State.SERVING, Event.FORCE_STOP_REQUESTED): State.CLEANUP,
    (State.SERVING, Event.FATAL_ERROR): State.FATAL,
    (State.UNREGISTERING, Event.UNREGISTERED): State.GRACE,
    (State.UNREGISTERING, Event.FORCE_STOP_REQUESTED): State.CLEANUP,
    (State.UNREGISTERING, Event.FATAL_ERROR): State.FATAL,
    (State.GRACE, Event.GRACE_OVER): State.DRAINING,
    (State.GRACE, Event.FORCE_STOP_REQUESTED): State.CLEANUP,
    (State.GRACE, Event.FATAL_ERROR): State.FATAL,
    (State.DRAINING, Event.DRAINED): State.CLEANUP,
    (State.DRAINING, Event.FORCE_STOP_REQUESTED): State.CLEANUP,
    (State.DRAINING, Event.FATAL_ERROR): State.FATAL,
    (State.CLEANUP, Event.CLEANED_UP): State.STOPPED,
    (State.FATAL, Event.CLEANED_UP): State.STOPPED,
}

#: The next state for every state and every event. A pair that means nothing keeps its state: a signal that arrives
#: during the clean-up changes no state, an engine that dies while it is shut down is no news.
TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (state, event): _MOVES.get((state, event), state) for state in State for event in Event
}
