"""The model card and the metric series of a real SGLang, field by field as Dynamo's own worker has them.

``python benchmarks/peer_record.py sglang --write`` records the latter anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.testing import Cluster, eventually
from dynamo_worker.testing.peer_record import card, card_differences, missing_series, series, topology_variables

RECORD = json.loads((Path(__file__).parent / "data" / "peer_record.json").read_text(encoding="utf-8"))
#: The benchmarks' own, which differ from those of these tests.
SIZE = ("--max-total-tokens", "32768", "--max-running-requests", "64")
#: Fields of the card that differ on purpose.
DIFFERENT = {
    "context_length": "what SGLang accepts, which keeps some tokens to itself",
    "runtime_config.context_length": "published even if it is not set by a flag",
    "runtime_config.disaggregated_endpoint": "an aggregated worker has no bootstrap server",
    "runtime_config.runtime_data.token_budget.combined_limit": "as the context length",
    "runtime_config.runtime_data.sglang_generate": "SGLang's own protocol for requests is not served",
    "runtime_config.runtime_data.token_budget.reject_total_overflow": "the worker shortens answers that would not fit",
}
#: Series that only Dynamo's own worker has.
MISSING: dict[str, str] = {}


@pytest.mark.timeout(400)
def test_card_and_series_are_those_of_dynamos_own_worker(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_frontend()
    # Otherwise the card says where to fetch the model's files.
    variables = {"DYN_SELF_HOST_METADATA": "0", **topology_variables(tmp_path / "topology")}
    worker = cluster.worker(*RECORD["flags"], *SIZE, **variables)
    cluster.wait_model()
    assert cluster.chat()[0] == 200
    found = card(cluster.discovery, worker.instance)
    differences = {where: (before, now) for where, before, now in card_differences(RECORD["card"], found)}
    assert differences.keys() == DIFFERENT.keys(), differences

    def missing() -> dict[str, Any]:
        return missing_series(RECORD["series"], series(worker.status("/metrics")[1]))

    # SGLang counts its own CPU time every 5 s.
    eventually(lambda: missing().keys() == MISSING.keys(), 30, f"all series but {list(MISSING)}")
    worker.stop()
