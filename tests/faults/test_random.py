"""Random faults on the echo engine, with its generation in a process tree."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.random_faults import RandomFaults

from .test_echo import echoed


@pytest.mark.timeout(3600)
class TestRandom(RandomFaults):
    ROUNDS = 100
    PLACES = 4
    SEED = 12
    REPEATS = 1

    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(
            "echo",
            ["--process-tree", "--tokens-per-second", "100"],
            processes={"core": r"echo_process:Core", "rank": r"echo_process rank"},
            expected=echoed,
            stream_tokens=120,
        )
