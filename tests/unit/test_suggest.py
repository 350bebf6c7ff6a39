"""Guessing what was meant."""

from __future__ import annotations

from dynamo_worker.suggest import suggestion


def test_suggestion():
    assert suggestion("vlm", ["echo", "vllm"]) == ", did you mean vllm?"
    assert suggestion("something", ["echo", "vllm"]) == ""
