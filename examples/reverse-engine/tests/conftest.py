"""The test kit of dynamo-worker: real workers, a real frontend, and a check for leftovers after every test."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Subject

pytest_plugins = ["dynamo_worker.testing.plugin"]


@pytest.fixture
def subject() -> Subject:
    # The prompts of the fault table have about 45 characters: a stream takes about 4 s.
    return Subject(
        "reverse",
        ["--tokens-per-second", "11"],
        model="reverse",
        processes={"core": r"dynamo_worker_reverse\.core"},
        expected=lambda prompt, tokens: prompt[::-1][:tokens],
    )
