"""Hooks that a plugin inherits are found, and reach the engine."""

from __future__ import annotations

import asyncio

from dynamo_worker.deadline import Deadline
from dynamo_worker.plugins import Plugins

PLUGIN = """
from dynamo_worker import EnginePlugin, hookimpl

class Engine:
    def __init__(self):
        self.calls = []

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


def test_inherited_hooks(site):
    site.module("toy_plugin", PLUGIN)
    site.install("toy-dist", engines={"toy": "toy_plugin:plugin"})
    plugins = Plugins.load("toy")
    assert plugins.engine.hooks == ("create_engine", "check_health", "drain", "cleanup")
    engine = plugins.create_engine(None, None)

    async def main():
        outcomes = await plugins.check_health(engine, timeout=1)
        outcomes += await plugins.drain(engine, Deadline.after(1))
        outcomes += await plugins.cleanup(engine, Deadline.after(1))
        assert all(outcome.ok for outcome in outcomes)

    asyncio.run(main())
    assert engine.calls == ["check_health", "drain", "shutdown"]
