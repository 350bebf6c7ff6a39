"""Checks of the token counts that an engine reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Trial


def _usage(trial: Trial) -> dict[str, Any]:
    usage = trial.plain().usage
    if not usage:
        trial.skip("the engine reports no usage")
    return usage


@only("tokens", "text")
class UsageChecks:
    """``completion_usage`` of an engine that sends it; the frontend counts for the others."""

    def test_usage_counts_the_prompt(self, trial: Trial) -> None:
        """Customers are billed by this number."""
        expected, got = trial.dialect.prompt_tokens(trial.plain().request), _usage(trial).get("prompt_tokens")
        right = got == expected if expected is not None else type(got) is int and got > 0
        trial.expect(right, f"prompt_tokens: expected {expected or 'some'}, got {got!r}", trial.engine.generate)

    def test_usage_counts_the_answer(self, trial: Trial) -> None:
        """Customers are billed by this number."""
        # The plain answer ends at its max_tokens.
        counted = trial.dialect.kind == "tokens"
        expected, got = trial.plain().made if counted else 12, _usage(trial).get("completion_tokens")
        trial.expect(got == expected, f"completion_tokens: expected {expected}, got {got!r}", trial.engine.generate)

    def test_total_usage_is_the_sum(self, trial: Trial) -> None:
        """Clients of the OpenAI interface rely on it."""
        usage = _usage(trial)
        total = (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0)
        got = usage.get("total_tokens")
        trial.expect(got == total, f"total_tokens: expected {total}, got {got!r}", trial.engine.generate)

    def test_cached_tokens_are_part_of_the_prompt(self, trial: Trial) -> None:
        """More cached tokens than the prompt has make the router believe in a cache that does not exist."""
        usage = _usage(trial)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        trial.expect(
            0 <= cached <= usage.get("prompt_tokens", 0),
            f"{cached} of {usage.get('prompt_tokens')} tokens are cached",
            trial.engine.generate,
        )

    def test_usage_of_one_token(self, trial: Trial) -> None:
        """The shortest answer is where an off-by-one shows."""
        _usage(trial)
        got = (trial.answer(1).usage or {}).get("completion_tokens")
        trial.expect(got == 1, f"completion_tokens of one token: got {got!r}", trial.engine.generate)

    def test_usage_is_that_of_each_request(self, trial: Trial) -> None:
        """Counts that add up over requests bill one customer for another."""
        _usage(trial)
        for tokens in (3, 5):
            got = (trial.answer(tokens, prompt=2).usage or {}).get("completion_tokens")
            trial.expect(got == tokens, f"completion_tokens: expected {tokens}, got {got!r}", trial.engine.generate)
