"""Hooks that a plugin inherits are found, and reach the engine."""

from __future__ import annotations

import asyncio

from dynamo_worker import EngineInfo
from dynamo_worker.deadline import Deadline
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.kit import preload

PLUGIN = """
from dynamo_worker import EnginePlugin, hookimpl

class Engine:
    def __init__(self):
        self.calls = []

    async def on_ready(self):
        self.calls.append("on_ready")

    async def check_health(self):
        self.calls.append("check_health")

    async def drain(self, deadline):
        self.calls.append("drain")

    async def shutdown(self, deadline):
        self.calls.append("shutdown")

class Plugin(EnginePlugin):
    @hookimpl
    def create_engine(self):
        return Engine()

plugin = Plugin()
"""


def test_inherited_hooks(site, monkeypatch):
    site.module("toy_plugin", PLUGIN)
    site.install("toy-dist", engines={"toy": "toy_plugin:plugin"})
    plugins = Plugins.load("toy")
    assert plugins.engine.hooks == ("create_engine", "on_ready", "check_health", "drain", "cleanup")
    engine = plugins.create_engine(None, None)

    async def main():
        outcomes = await plugins.on_ready(engine, EngineInfo("toy", None), timeout=1)
        outcomes += await plugins.check_health(engine, timeout=1)
        outcomes += await plugins.drain(engine, Deadline.after(1))
        outcomes += await plugins.cleanup(engine, Deadline.after(1))
        assert all(outcome.ok for outcome in outcomes)

    dismissed = []
    monkeypatch.setattr(preload, "dismiss", lambda: dismissed.append(True))
    asyncio.run(main())
    assert dismissed == [True], "what was preloaded and not needed ends when the worker is ready"
    assert engine.calls == ["on_ready", "check_health", "drain", "shutdown"]
