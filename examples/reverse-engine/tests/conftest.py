"""The test kit of dynamo-worker: real workers, a real frontend, and a check for leftovers after every test."""

from __future__ import annotations

pytest_plugins = ["dynamo_worker.testing.plugin"]
