"""The fault table on an engine class that computes in a process of its own."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker.testing.fault_table import FaultTable

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Cluster

CLASS = ("--engine-class", "engine_classes:CountingEngine", "--model")


@pytest.fixture
def subject(model: Path) -> Subject:
    refused = ("--refuse-fields", "n,guided_decoding,stop_token_ids,prompt_logprobs,logprobs")
    return Subject(
        "dynamo",
        [*refused, *CLASS, str(model)],
        model="counting",
        processes={"core": r"engine_classes\.py"},
        expected=lambda _, tokens: "".join(f" w{number}" for number in range(1, tokens + 1)),
    )


class TestFaults(FaultTable):
    pass


class TestConformance(EngineConformance):
    pass


class TestServing:
    def test_what_the_class_offers(self, cluster: Cluster) -> None:
        """Names, controls, metrics and errors of the class; what it does to logging and signals is undone."""
        cluster.start_frontend()
        worker = cluster.worker("--loud", "--grace-period", "0")
        cluster.wait_model()
        assert sorted(cluster.models()) == ["counting", "numbers"]
        assert cluster.ask(12).text == "".join(f" w{number}" for number in range(1, 13))
        assert worker.operate("note", {"a": 1}) == {"status": "ok", "noted": {"a": 1}}
        assert worker.operate("control/note", {"a": 2})["noted"] == {"a": 2}
        assert worker.operate("update/taint") == {"status": "error", "message": "nothing to taint"}
        assert worker.metric("counting:tokens_total") == 13  # the warm-up has the first
        assert worker.metric("dynamo_component_total_blocks") == 100
        assert worker.metric("dynamo_component_kv_cache_hit_rate") == 0.25
        status, answer = cluster.complete(prompt=[13, 14])
        assert (status, "thirteen is not a number" in str(answer)) == (400, True)
        worker.signal(signal.SIGTERM, worker.worker_pid)
        assert worker.wait_gone(10) == 0
        assert "Leaving discovery" in worker.log

    def test_a_cleanup_that_hangs(self, cluster: Cluster) -> None:
        """The worker ends in its time, and with it the class's processes."""
        worker = cluster.worker("--hang", "--grace-period", "0", "--engine-shutdown-timeout", "1")
        core = worker.child(r"engine_classes\.py")
        started = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert worker.wait_gone(10) == 0
        assert time.monotonic() - started < 8
        assert core not in worker.children()
