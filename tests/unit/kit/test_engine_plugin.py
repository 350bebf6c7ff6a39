"""Hooks that a plugin inherits are found, import what the plugin names, and reach the engine."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys

import pytest

from dynamo_worker import EngineInfo, EnginePlugin
from dynamo_worker.deadline import Deadline
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.kit import preload
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error

PLUGIN = """
from dynamo_worker import EnginePlugin

class Plugin(EnginePlugin):
    dynamo_worker_api = "1"
    engine = "toy_serving:Engine"
    headless_engine = "toy_serving:Node"
    arguments = "toy_serving:add"
    preload = "toy_serving:preload"
    environment = {"TOY_SEED": "0", "TOY_REPORTS": "no"}

    def is_headless(self, args):
        return args.headless

plugin = Plugin()
"""

ENGINE = """
import os

preloaded = []

class Engine:
    def __init__(self, args, context):
        self.calls = []

    async def on_ready(self):
        self.calls.append("on_ready")

    async def check_health(self):
        self.calls.append("check_health")

    async def drain(self, deadline):
        self.calls.append("drain")

    def mark_failed(self):
        self.calls.append("mark_failed")

    async def shutdown(self, deadline):
        self.calls.append("shutdown")

class Node(Engine):
    pass

def add(parser):
    parser.add_argument("--headless", action="store_true")

def preload(arguments):
    preloaded.append((arguments, os.environ["TOY_SEED"], os.environ["TOY_REPORTS"]))
"""

HOOKS = (
    *("prepare", "add_arguments", "create_engine", "on_ready"),
    *("check_health", "drain", "on_fatal_error", "cleanup"),
)


@pytest.fixture
def plugins(site):
    site.module("toy_plugin", PLUGIN)
    site.module("toy_serving", ENGINE)
    site.install("toy-dist", engines={"toy": "toy_plugin:plugin"})
    loaded = Plugins.load("toy")
    assert loaded.engine.hooks == HOOKS
    assert "toy_serving" not in sys.modules, "the list of engines imports no engine"
    yield loaded
    sys.modules.pop("toy_serving", None)


def test_modules_are_imported_when_they_are_needed(plugins, monkeypatch):
    monkeypatch.setenv("TOY_SEED", "7")  # the operator's
    monkeypatch.setenv("TOY_REPORTS", "")  # so that it is removed in the end
    monkeypatch.delenv("TOY_REPORTS")
    plugins.prepare(["--headless"])
    assert sys.modules["toy_serving"].preloaded == [(["--headless"], "7", "no")]
    parser = argparse.ArgumentParser()
    plugins.add_arguments(parser)
    for flags, kind in (([], "Engine"), (["--headless"], "Node")):
        assert type(plugins.create_engine(parser.parse_args(flags), None)).__name__ == kind


def test_inherited_hooks(plugins, monkeypatch):
    engine = plugins.create_engine(argparse.Namespace(headless=False), None)

    async def main():
        outcomes = await plugins.on_ready(engine, EngineInfo("toy", None), timeout=1)
        outcomes += await plugins.check_health(engine, timeout=1)
        outcomes += await plugins.drain(engine, Deadline.after(1))
        outcomes += await plugins.on_fatal_error(engine, RuntimeError(), Deadline.after(1))
        outcomes += await plugins.on_fatal_error(None, RuntimeError(), Deadline.after(1))
        outcomes += await plugins.cleanup(engine, Deadline.after(1))
        assert all(outcome.ok for outcome in outcomes)

    dismissed = []
    monkeypatch.setattr(preload, "dismiss", lambda: dismissed.append(True))
    asyncio.run(main())
    assert dismissed == [True], "what was preloaded and not needed ends when the worker is ready"
    assert engine.calls == ["on_ready", "check_health", "drain", "mark_failed", "shutdown"]


def test_a_plugin_that_names_only_its_engine():
    class Small(EnginePlugin):
        engine = "types:SimpleNamespace"

    small = Small()
    small.prepare([])
    parser = argparse.ArgumentParser()
    small.add_arguments(parser)
    assert not small.is_headless(parser.parse_args([]))


def test_the_lifecycle_of_an_engine_that_needs_nothing():
    async def main():
        engine = EngineLifecycle()
        await engine.on_ready()
        await engine.check_health()
        await engine.drain(Deadline.after(1))
        engine.mark_failed()
        await engine.shutdown(Deadline.after(1))

    asyncio.run(main())


def test_a_start_that_fails_points_to_the_engines_own_log():
    error = start_error("Toy", ValueError("no GPU"))
    assert str(error) == "Toy failed to start: no GPU\n  next: see the engine's log output above"


def test_the_base_class_is_cheap_to_import():
    code = "import sys, dynamo_worker.kit.engine_plugin; print({'asyncio', 'dynamo', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
