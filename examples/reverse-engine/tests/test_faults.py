"""Everything that can go wrong with a worker, done to this engine."""

from __future__ import annotations

import pytest

from dynamo_worker.testing.fault_table import FaultTable, Subject


class TestReverse(FaultTable):
    @pytest.fixture
    def subject(self) -> Subject:
        # The prompts of the table have some 45 characters, so that a stream takes about 4 s.
        return Subject(
            args=["--engine", "reverse", "--tokens-per-second", "11"],
            processes={"core": r"dynamo_worker_reverse\.core"},
            model="reverse",
            expected=lambda prompt, tokens: prompt[::-1][:tokens],
        )
