"""Checks of an engine that dies: nobody takes it for a well one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_worker.testing.crash import Crash


class CrashChecks:
    """An engine one of whose processes is killed in the middle of an answer."""

    def test_a_death_is_not_swallowed(self, crash: Crash) -> None:
        """A death that is swallowed looks like a complete answer: the client loses the rest, and nothing migrates."""
        answer = crash.answer
        complete = answer is not None and bool(answer.reasons)
        crash.trial.expect(
            not complete, f"the answer ended as if it were complete: {answer!r:.200}", crash.trial.engine.generate
        )

    def test_a_dead_engine_answers_no_request(self, crash: Crash) -> None:
        """An answer that comes from nowhere is worse than none: the client takes it for the model's."""
        later = crash.later
        answered = later is not None and bool(later.chunks)
        crash.trial.expect(not answered, f"a later request was answered: {later!r:.200}", crash.trial.engine.generate)

    def test_the_health_check_tells_of_a_death(self, crash: Crash) -> None:
        """A check that lies keeps a dead worker in service until its stall is found."""
        crash.trial.expect(
            crash.health is not None,
            "check_health returned as if the engine were well",
            getattr(crash.trial.engine, "check_health", None),
        )

    def test_cleanup_after_a_death_works(self, crash: Crash) -> None:
        """The rest of the engine must go too, or it keeps its memory."""
        crash.trial.expect(
            crash.cleanup is None, f"cleanup: {crash.cleanup}", getattr(crash.trial.engine, "shutdown", None)
        )

    def test_cleanup_after_a_death_is_prompt(self, crash: Crash) -> None:
        """Waiting for a process that is dead delays the restart."""
        limit = 10.0 * crash.trial.subject.patience
        crash.trial.expect(crash.cleanup_seconds < limit, f"cleanup took {crash.cleanup_seconds:.1f} s")
