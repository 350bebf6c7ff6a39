"""The fault table on the echo engine: with its generation in a process tree, and inside the worker."""

from __future__ import annotations

import itertools

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import FaultTable


def echoed(prompt: str, tokens: int) -> str:
    """Return what the echo engine answers: the prompt's bytes, over and over."""
    return "".join(itertools.islice(itertools.cycle(prompt), tokens))


class TestProcessTree(FaultTable):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(
            "echo",
            ["--process-tree", "--tokens-per-second", "80"],
            processes={"core": r"echo_process:Core", "rank": r"echo_process rank"},
            expected=echoed,
        )


class TestInProcess(FaultTable):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject("echo", ["--tokens-per-second", "80"], expected=echoed)


@pytest.mark.slow  # tests/integration/test_text.py has what differs
class TestText(FaultTable):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(
            "echo",
            ["--text", "--process-tree", "--tokens-per-second", "80"],
            processes={"core": r"echo_process:Core"},
            expected=echoed,
            migrates=False,
        )
