"""A drain that an operator requests: its phases, and the names of its control routes.

Standard library only: the command line imports it.
"""

from __future__ import annotations

import enum
from typing import Final

#: Names of the control routes below ``/engine/``.
DRAIN: Final = "control/drain"
RESUME: Final = "control/resume"
DRAIN_STATUS: Final = "control/drain_status"


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
