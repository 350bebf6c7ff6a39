"""The route that sets the taints of a worker's model."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from dynamo_worker.host.status.model_taints import taint_routes


def call(body: Any) -> tuple[dict[str, Any], list[Collection[str]]]:
    given: list[Collection[str]] = []

    async def update(taints: Collection[str]) -> None:
        given.append(taints)

    return asyncio.run(taint_routes(update)["update/model_taints"](body)), given


def test_taints_are_replaced() -> None:
    answer, given = call({"taints": ["b", "a", "b"]})
    assert answer == {"status": "ok", "taints": ["a", "b"]}
    assert given == [["a", "b"]]
    assert call({"taints": []})[1] == [[]]


@pytest.mark.parametrize(
    "body", [None, [], {}, {"taints": "a"}, {"taints": ["a", 1]}, {"taints": ["x", "dynamo.topology/zone=a"]}]
)
def test_a_wrong_body_changes_nothing(body: Any) -> None:
    answer, given = call(body)
    assert answer["status"] == "error"
    assert "taints" in answer["message"]
    assert given == []
