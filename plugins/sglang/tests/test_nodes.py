"""The first node tells its followers that it serves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_worker_sglang import nodes


def test_the_first_node_tries_until_the_store_has_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a network failure of a moment would leave the followers waiting forever."""
    connected: list[str] = []
    keys: dict[str, str] = {}

    class Store:
        def set(self, key: str, value: str) -> None:
            keys[key] = value

    def store(address: str) -> Any:
        connected.append(address)
        if len(connected) < 3:
            raise RuntimeError("connection refused")
        return Store()

    monkeypatch.setattr(nodes, "_store", store)
    monkeypatch.setattr(nodes, "_RETRY_SECONDS", 0.001)
    asyncio.run(asyncio.wait_for(nodes.announce("leader:5000"), 10))
    assert connected == ["leader:5000"] * 3
    assert keys == {"dynamo-worker/first-node": "serves"}
    assert caplog.text.count("cannot reach the store") == 2
