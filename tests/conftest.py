"""Fixtures of all tests: the kit that plugin authors use too."""

from __future__ import annotations

pytest_plugins = ["dynamo_worker.testing.plugin"]
