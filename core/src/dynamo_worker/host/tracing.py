"""The spans that the Dynamo runtime exports through OpenTelemetry, and what would be lost of them at the end.

The runtime (1.6.1) starts an exporter when it is imported, which sends finished spans in batches, by default every 5 s,
and offers no way to flush it. A worker that ends at once takes the spans of its last requests with it.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline

#: The runtime exports spans if this is one of :data:`_TRUE`.
ENABLED: Final = "OTEL_EXPORT_ENABLED"
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
#: Milliseconds between two batches, for OpenTelemetry's SDK; it also uses the default for what is no number.
SCHEDULE_DELAY: Final = "OTEL_BSP_SCHEDULE_DELAY"
_SDK_DELAY: Final = 5000
#: Ours: the wait at the end is as long.
_DELAY: Final = 500
#: Seconds for a collector to take the last batch.
_EXPORT_SECONDS: Final = 0.5
#: Most seconds to wait at the end, however long the delay is.
_MOST_SECONDS: Final = 6.0


def exports() -> bool:
    """Return whether the runtime exports spans."""
    return os.environ.get(ENABLED, "").strip().lower() in _TRUE


def prepare() -> None:
    """Send spans soon after they have ended, unless the operator has chosen a delay.

    Call this before importing ``dynamo``, which reads the variable.
    """
    if exports():
        os.environ.setdefault(SCHEDULE_DELAY, str(_DELAY))


def unsent_seconds() -> float:
    """Return for how many seconds a span that has just ended may not have reached the collector; 0 without export."""
    if not exports():
        return 0.0
    text = os.environ.get(SCHEDULE_DELAY, "").strip()
    # The SDK reads an unsigned integer; a number of 20 digits is none either.
    delay = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else _SDK_DELAY
    return min(delay / 1000 + _EXPORT_SECONDS, _MOST_SECONDS)


async def wait_until_sent(since: float, deadline: Deadline) -> None:
    """Wait until the last spans have been exported, at most until the deadline; without export return at once.

    :param since: when the last span ended (monotonic).
    """
    seconds = min(since + unsent_seconds() - time.monotonic(), deadline.remaining())
    if exports() and seconds > 0:
        await asyncio.sleep(seconds)
