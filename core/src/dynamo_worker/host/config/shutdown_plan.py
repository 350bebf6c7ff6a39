"""Divide the termination grace period between the stages of a shutdown (pure arithmetic, no clock)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from dynamo_worker.deadline import Deadline
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Most seconds the endpoints get to leave discovery.
UNREGISTER_LIMIT: Final = 1.0
#: Seconds reserved for the `cleanup` hooks; engines need about that long in practice. The limit of one hook
#: (`engine_shutdown_timeout`) may be longer; it then uses time that the drain left over.
CLEANUP_RESERVE: Final = 5.0
#: Warn about a drain shorter than this, in seconds.
SHORT_DRAIN: Final = 1.0


class Stage(NamedTuple):
    """One stage of the timeline, in seconds after the stop was requested."""

    name: str
    start: float
    end: float

    @property
    def duration(self) -> float:
        """Return the length of the stage in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class ShutdownPlan:
    """The stages of a shutdown, in seconds; they add up to ``total`` when they fit.

    :param total: the termination grace period, after which the platform kills the process.
    :param unregister: most time to leave discovery.
    :param grace: time to keep serving, for routers that have not noticed yet.
    :param drain: time for requests in flight; time left over goes to the clean-up.
    :param cleanup: time reserved for the `cleanup` hooks.
    :param kill_reserve: time for the supervisor at the end.
    :param warnings: the stages that do not fit, in words; empty when all do.
    """

    total: float
    unregister: float
    grace: float
    drain: float
    cleanup: float
    kill_reserve: float = KILL_RESERVE
    warnings: Sequence[str] = ()

    @classmethod
    def divide(
        cls, total: float, grace: float, cleanup_limit: float, mode: DrainMode = DrainMode.COMPLETE
    ) -> ShutdownPlan:
        """Divide ``total`` seconds: reserve the fixed stages, give the rest to the drain.

        :param total: the termination grace period.
        :param grace: the requested grace period.
        :param cleanup_limit: most time one `cleanup` hook may take.
        :param mode: whether the drain needs time at all.
        """
        cleanup = min(cleanup_limit, CLEANUP_RESERVE)
        drain = total - KILL_RESERVE - cleanup - UNREGISTER_LIMIT - grace
        warnings = []
        if grace >= total:
            warnings.append(
                f"the grace period ({grace:g} s) is not shorter than the termination grace period ({total:g} s): "
                "the worker would be killed before it drains"
            )
        elif drain < 0:
            warnings.append(
                f"without a drain the stages need {total - drain:g} s; the termination grace period is {total:g} s: "
                f"{-drain:g} s are missing"
            )
        elif mode.waits and drain < SHORT_DRAIN:
            warnings.append(
                f"only {drain:g} s are left for requests in flight; those that do not finish are handed off to other "
                "workers"
            )
        return cls(
            total=total,
            unregister=UNREGISTER_LIMIT,
            grace=grace,
            drain=max(0.0, drain),
            cleanup=cleanup,
            warnings=tuple(warnings),
        )

    @property
    def fits(self) -> bool:
        """Whether all stages end within ``total``."""
        return self.stages()[-1].end <= self.total + 1e-9

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order; each must be over at its end."""
        stages = []
        start = 0.0
        for name in ("unregister", "grace", "drain", "cleanup", "kill_reserve"):
            end = start + getattr(self, name)
            stages.append(Stage(name, start, end))
            start = end
        return tuple(stages)

    def worker_deadline(self, received_at: float) -> Deadline:
        """Return when the worker process must have ended by itself.

        :param received_at: ``time.monotonic()`` when the stop was requested.
        """
        return Deadline(received_at + self.total - self.kill_reserve)

    def drain_deadline(self, received_at: float) -> Deadline:
        """Return when the drain must be over to leave the clean-up its reserve."""
        return self.worker_deadline(received_at).reserve(self.cleanup)

    def unregister_deadline(self, received_at: float) -> Deadline:
        """Return when the endpoints must be out of discovery."""
        return Deadline(min(received_at + self.unregister, self.drain_deadline(received_at).at))

    def grace_deadline(self, unregistered_at: float, received_at: float) -> Deadline:
        """Return when the grace period ends: it starts on leaving discovery and never takes time from the clean-up."""
        return Deadline(min(unregistered_at + self.grace, self.drain_deadline(received_at).at))

    @staticmethod
    def forced_deadline(received_at: float) -> Deadline:
        """Return when everything must be over after a second signal."""
        return Deadline(received_at + FORCED_STOP)
