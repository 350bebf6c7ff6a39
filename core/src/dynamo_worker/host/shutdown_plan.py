"""How the termination grace period is divided between the stages of a shutdown (pure arithmetic, no clock)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from dynamo_worker.deadline import Deadline
from dynamo_worker.supervisor.protocol import FORCED_STOP, KILL_RESERVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.host.settings import WorkerSettings

#: Seconds the endpoints have at most to leave discovery.
UNREGISTER_LIMIT: Final = 1.0
#: Seconds kept for the `cleanup` hooks: what engines really need. The cap of one hook (`engine_shutdown_timeout`) may
#: be longer; it then lives on what the drain left over.
CLEANUP_RESERVE: Final = 5.0
#: A drain shorter than this is reported as too short.
SHORT_DRAIN: Final = 1.0


class Stage(NamedTuple):
    """One slice of the timeline, in seconds after the stop was asked for."""

    name: str
    start: float
    end: float

    @property
    def duration(self) -> float:
        """Return the length of the slice in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class ShutdownPlan:
    """The slices of the termination grace period, in seconds; they add up to ``total`` when they fit.

    :param total: the termination grace period: after it the platform kills the process.
    :param unregister: most time for leaving discovery.
    :param grace: time in which requests of routers that have not noticed yet are still served.
    :param drain: time for the requests in flight; what is left over goes to the clean-up.
    :param cleanup: time reserved for the `cleanup` hooks.
    :param kill_reserve: the supervisor's time at the end.
    :param warnings: what does not fit, in words; empty when everything does.
    """

    total: float
    unregister: float
    grace: float
    drain: float
    cleanup: float
    kill_reserve: float = KILL_RESERVE
    warnings: Sequence[str] = ()

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> ShutdownPlan:
        """Return the plan for these settings."""
        return cls.divide(
            total=settings.termination_grace_period,
            grace=settings.grace_period,
            cleanup_limit=settings.engine_shutdown_timeout,
            drain_mode=settings.drain,
        )

    @classmethod
    def divide(cls, total: float, grace: float, cleanup_limit: float, drain_mode: str = "complete") -> ShutdownPlan:
        """Divide ``total`` seconds: the fixed slices are reserved from the end, the drain gets what is left.

        :param total: the termination grace period.
        :param grace: the wanted grace period.
        :param cleanup_limit: most time one `cleanup` hook may take.
        :param drain_mode: ``complete``, ``handoff`` or ``abort``; only ``complete`` needs time for the drain.
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
                f"the stages need {total - drain:g} s without any drain, the termination grace period is {total:g} s: "
                f"{-drain:g} s are missing"
            )
        elif drain_mode == "complete" and drain < SHORT_DRAIN:
            warnings.append(
                f"only {drain:g} s are left for requests in flight; what does not finish is handed off to other workers"
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
        """Return the slices in order; their end says when each one has to be over."""
        stages = []
        start = 0.0
        for name in ("unregister", "grace", "drain", "cleanup", "kill_reserve"):
            end = start + getattr(self, name)
            stages.append(Stage(name, start, end))
            start = end
        return tuple(stages)

    def worker_deadline(self, received_at: float) -> Deadline:
        """Return when the worker has to be gone by itself.

        :param received_at: ``time.monotonic()`` of the moment the stop was asked for.
        """
        return Deadline(received_at + self.total - self.kill_reserve)

    def drain_deadline(self, received_at: float) -> Deadline:
        """Return when the drain has to be over so that the clean-up still has its reserve."""
        return self.worker_deadline(received_at).reserve(self.cleanup)

    def unregister_deadline(self, received_at: float) -> Deadline:
        """Return when the endpoints have to be out of discovery."""
        return Deadline(min(received_at + self.unregister, self.drain_deadline(received_at).at))

    def grace_deadline(self, unregistered_at: float, received_at: float) -> Deadline:
        """Return when the grace period ends: counted from leaving discovery, never at the clean-up's cost."""
        return Deadline(min(unregistered_at + self.grace, self.drain_deadline(received_at).at))

    @staticmethod
    def forced_deadline(received_at: float) -> Deadline:
        """Return when everything has to be over after a second signal."""
        return Deadline(received_at + FORCED_STOP)
