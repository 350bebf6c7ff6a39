"""What tests of the host share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def environment(monkeypatch):
    """Keep what a module writes to the environment out of other tests."""
    for name in ("ETCD_ENDPOINTS", "NATS_SERVER", "DYN_FILE_KV", "DYN_SYSTEM_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
