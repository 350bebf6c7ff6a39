"""What is published with a model that SGLang serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker_sglang.runtime_data import gates_reasoning, runtime_data, uses_eagle

SETTINGS: dict[str, Any] = {"reasoning_parser": None, "speculative_num_steps": None, "speculative_algorithm": None}


def tokenizer(*tokens: int) -> Any:
    return SimpleNamespace(encode=lambda text, add_special_tokens: list(tokens), decode=lambda ids: "")


def test_without_anything_special() -> None:
    budget = {"combined_limit": 4096, "reject_prompt_overflow": True, "reject_total_overflow": False}
    assert runtime_data(SETTINGS, 4096, None) == {"token_budget": budget}


@pytest.mark.parametrize(
    ("parser", "given", "expected"),
    [("qwen3", tokenizer(1), True), ("qwen3", tokenizer(), False), ("qwen3", None, False), (None, tokenizer(1), False)],
)
def test_whether_grammars_begin_after_the_reasoning(parser: str | None, given: Any, expected: bool) -> None:
    assert gates_reasoning(parser, given) is expected
    data = runtime_data({**SETTINGS, "reasoning_parser": parser}, 4096, given)
    assert data.get("tool_call_structural_tag_reasoning_gate", False) is expected


def test_speculative_decoding() -> None:
    settings = {**SETTINGS, "speculative_num_steps": 3, "speculative_algorithm": "EAGLE"}
    expected = {"nextn": 3, "source": "backend_config", "method": "EAGLE"}
    assert runtime_data(settings, 4096, None)["spec_decode"] == expected


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("EAGLE", True), ("EAGLE3", True), (None, False), ("NGRAM", False)]
)
def test_whether_blocks_are_keyed_by_pairs(algorithm: str | None, expected: bool) -> None:
    assert uses_eagle(algorithm) is expected


def test_an_unknown_algorithm_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert uses_eagle("PHOENIX") is False
    assert "Routers are not told that SGLang speculates" in caplog.text
