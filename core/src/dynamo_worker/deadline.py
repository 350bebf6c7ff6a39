"""One absolute, monotonic deadline, shared by everybody who has to finish by it."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """A point on the ``time.monotonic()`` clock, in seconds. Linux shares that clock between all processes."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that lies ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Return the seconds left, never less than 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the deadline lies in the past."""
        return time.monotonic() >= self.at

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and ``seconds`` from now: a slice that never outlives the whole."""
        return Deadline(min(self.at, time.monotonic() + seconds))

    def reserve(self, seconds: float) -> Deadline:
        """Return this deadline moved ``seconds`` earlier, so that what comes after still has its time."""
        return Deadline(self.at - seconds)
