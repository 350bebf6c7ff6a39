"""Checks of an engine that dies: nobody takes it for a well one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker.testing.death import Death


class DeathChecks:
    """An engine one of whose processes is killed in the middle of an answer."""

    def test_a_death_is_not_swallowed(self, death: Death) -> None:
        """A death that is swallowed looks like a complete answer: the client loses the rest, and nothing migrates."""
        answer = death.answer
        complete = answer is not None and bool(answer.reasons)
        death.trial.expect(
            not complete, f"the answer ended as if it were complete: {answer!r:.200}", death.trial.engine.generate
        )

    def test_a_dead_engine_answers_no_request(self, death: Death) -> None:
        """An answer that comes from nowhere is worse than none: the client takes it for the model's."""
        later = death.later
        answered = later is not None and bool(later.chunks)
        death.trial.expect(not answered, f"a later request was answered: {later!r:.200}", death.trial.engine.generate)

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
