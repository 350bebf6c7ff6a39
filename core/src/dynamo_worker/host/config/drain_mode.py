"""The modes of ``--drain``, and the ways to end a request before it is complete.

Standard library only: the command line and the documentation are built without importing the runtime.
"""

from __future__ import annotations

import enum


class Cut(enum.Enum):
    """How a request in flight is ended before it is complete."""

    #: With an error that makes the frontend migrate it: another worker continues after the tokens already sent.
    HANDOFF = "handoff"
    #: With an error that the client sees.
    ABORT = "abort"
    #: With an error, because its client does not read.
    SLOW_CLIENT = "slow_client"


class DrainMode(str, enum.Enum):
    """The value of ``--drain``."""

    #: Requests finish; those that do not finish in time are handed off.
    COMPLETE = "complete"
    #: All requests are handed off at once.
    HANDOFF = "handoff"
    #: All requests are aborted at once.
    ABORT = "abort"

    def __str__(self) -> str:
        return self.value

    @property
    def waits(self) -> bool:
        """Whether requests get time to finish."""
        return self is DrainMode.COMPLETE

    @property
    def cut(self) -> Cut:
        """How requests that do not finish are ended."""
        return Cut.ABORT if self is DrainMode.ABORT else Cut.HANDOFF

    @property
    def default_grace_period(self) -> float:
        """Seconds to keep serving after leaving discovery, unless the operator sets ``--grace-period``."""
        return 5.0 if self.waits else 0.0

    @property
    def remainder(self) -> str:
        """The fate of requests left at the end of the drain, for messages: ``aborted`` or ``handed off``."""
        return "aborted" if self is DrainMode.ABORT else "handed off"

    @property
    def summary(self) -> str:
        """The effect on requests in flight, in one clause."""
        return {
            DrainMode.COMPLETE: "requests in flight finish; those left at the end are handed off",
            DrainMode.HANDOFF: "requests in flight are handed off to other workers at once",
            DrainMode.ABORT: "requests in flight are aborted at once",
        }[self]
