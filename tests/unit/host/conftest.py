"""What tests of the host share."""

from __future__ import annotations

import os

import pytest
from worker_world import World

from dynamo_worker.supervisor.protocol import RUN_DIR


@pytest.fixture
def environment(monkeypatch):
    """Keep what a module writes to the environment out of other tests."""
    for name in ("ETCD_ENDPOINTS", "NATS_SERVER", "DYN_FILE_KV", "DYN_SYSTEM_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_DIR, raising=False)
    return World(tmp_path, monkeypatch)
