"""Checks of an engine that dies: nobody takes it for a well one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker.testing.death import Death


class DeathChecks:
    """An engine one of whose processes is killed in the middle of an answer."""

    def test_an_answer_that_the_engine_dies_under_fails(self, death: Death) -> None:
        """A death that is swallowed looks like a complete answer: the request does not migrate."""
        trial = death.trial
        trial.expect(
            death.in_flight is not None,
            f"the answer ended as if it were complete: {death.answer!r:.200}",
            trial.engine.generate,
        )

    def test_a_request_to_a_dead_engine_fails(self, death: Death) -> None:
        """A request that waits for a dead engine, or gets an empty answer, is lost."""
        death.trial.expect(death.afterwards is not None, "it was answered, or still waits", death.trial.engine.generate)

    def test_the_health_check_tells_of_a_death(self, death: Death) -> None:
        """A check that lies keeps a dead worker in service until its stall is found."""
        death.trial.expect(
            death.health is not None,
            "check_health returned as if the engine were well",
            getattr(death.trial.engine, "check_health", None),
        )

    def test_cleanup_after_a_death_works(self, death: Death) -> None:
        """The rest of the engine must go too, or it keeps its memory."""
        death.trial.expect(
            death.cleanup is None, f"cleanup: {death.cleanup}", getattr(death.trial.engine, "shutdown", None)
        )

    def test_cleanup_after_a_death_is_prompt(self, death: Death) -> None:
        """Waiting for a process that is dead delays the restart."""
        limit = 10.0 * death.trial.subject.patience
        death.trial.expect(death.cleanup_seconds < limit, f"cleanup took {death.cleanup_seconds:.1f} s")
