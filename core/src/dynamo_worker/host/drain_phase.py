"""The phases of a drain that an operator requests (standard library only)."""

from __future__ import annotations

import enum


class DrainPhase(str, enum.Enum):
    """Where a serving worker is between service and drained. The value is what answers and metrics show."""

    #: In discovery, accepting requests.
    SERVING = "serving"
    #: Every endpoint leaves discovery.
    LEAVING = "leaving"
    #: Out of discovery, still accepting requests that routers send.
    GRACE = "grace"
    #: New requests are refused; those in flight finish or are handed off.
    DRAINING = "draining"
    #: Nothing is in flight, and new requests are refused. The engine is warm.
    DRAINED = "drained"
    #: Accepting requests, and entering discovery again.
    RESUMING = "resuming"

    def __str__(self) -> str:
        return self.value
