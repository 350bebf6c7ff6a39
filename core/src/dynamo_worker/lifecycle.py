"""The worker's life cycle as data: states, events, and the table of all transitions."""

from __future__ import annotations

import enum
from typing import Final


class State(str, enum.Enum):
    """A state of the worker. The value is what logs, metrics and the supervisor see."""

    #: The runtime is up and the engine is starting; not ready.
    STARTING = "STARTING"
    #: The model is registered and requests are answered.
    SERVING = "SERVING"
    #: A stop was requested: every endpoint leaves discovery.
    UNREGISTERING = "UNREGISTERING"
    #: Out of discovery, still serving requests that routers send.
    GRACE = "GRACE"
    #: New requests are rejected; those in flight finish or are handed off.
    DRAINING = "DRAINING"
    #: The `cleanup` hooks run, one after another.
    CLEANUP = "CLEANUP"
    #: A fatal error: leave discovery, hand off, call `on_fatal_error`, clean up, exit.
    FATAL = "FATAL"
    #: Everything has stopped; the process exits.
    STOPPED = "STOPPED"

    def __str__(self) -> str:
        return self.value


class Event(str, enum.Enum):
    """What moves the worker from one state to the next."""

    #: The engine is warmed up and the model is registered.
    ENGINE_READY = "ENGINE_READY"
    #: The engine or the runtime could not start.
    START_FAILED = "START_FAILED"
    #: First signal: stop gracefully.
    STOP_REQUESTED = "STOP_REQUESTED"
    #: Second signal: stop within seconds.
    FORCE_STOP_REQUESTED = "FORCE_STOP_REQUESTED"
    #: The engine, the runtime or discovery is lost.
    FATAL_ERROR = "FATAL_ERROR"
    #: Every endpoint has left discovery, or did not in time.
    UNREGISTERED = "UNREGISTERED"
    #: The grace period is over.
    GRACE_OVER = "GRACE_OVER"
    #: No request is in flight, or the drain timeout has passed.
    DRAINED = "DRAINED"
    #: All `cleanup` hooks returned or timed out.
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

#: The next state for every state and event. Pairs without a meaning keep the state: neither a signal during cleanup nor
#: an engine that dies while it is shut down changes anything.
TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (state, event): _MOVES.get((state, event), state) for state in State for event in Event
}
