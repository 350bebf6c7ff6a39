"""What `dynamo-worker check` finds beyond a plugin's validation."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
from tests.unit import toy_plugins

from dynamo_worker.host.config.own_flags import SWITCHES
from dynamo_worker.host.plugins.facade import Plugins, check
from dynamo_worker.host.plugins.flags import colliding
from dynamo_worker.host.plugins.plugin_errors import PluginError, UnknownPluginError
from dynamo_worker.host.plugins.plugin_loader import engine_entry

METHODS = """
class Toy:
    async def start(self, worker_id): ...
    async def generate(self, request, context): yield {}
    def processes(self): return ()
"""
PLUGIN = """
from dynamo_worker import EnginePlugin
class Plugin(EnginePlugin):
    engine = "toy_engine:Toy"
    claimed_flags = ("--log-level",)
    @hookimpl
    def add_arguments(self, parser):
        for flag in ("--size", "--log-level", "--namespace"):
            parser.add_argument(flag)
plugin = Plugin()
"""


def checked(site, source=PLUGIN, engine=METHODS + "    async def abort(self, request_id): ...\n"):
    site.module("toy_engine", engine)
    site.module("toy_plugin", toy_plugins.HOOKIMPL + source)
    site.install("toy-dist", engines={"toy": "toy_plugin:plugin" if "plugin =" in source else "toy_plugin"})
    return check("toy")


def test_a_flag_that_the_worker_takes_is_a_warning(site):
    (record,), errors = checked(site)
    assert not errors
    assert record.status == "ok"
    (warning,) = record.warnings
    assert "--namespace is the worker's, too" in warning


def test_an_engine_without_abort(site):
    (record,), (error,) = checked(site, engine=METHODS)
    assert record.status == "broken"
    assert isinstance(error, PluginError)
    assert "has no method 'abort'" in str(error)


def test_an_engine_that_cannot_be_imported_here_is_a_warning(site):
    (record,), errors = checked(site, engine="import no_such_package")
    assert not errors
    assert any("its methods were not checked" in warning for warning in record.warnings)


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [("create_engine", "args"), ("configure", "args"), ("add_arguments", "parser"), ("prepare", "arguments")],
)
def test_a_hook_that_is_not_awaited(site, hook, arguments):
    source = "" if hook == "create_engine" else toy_plugins.CREATE
    _, (error,) = checked(site, source + f"@hookimpl\nasync def {hook}({arguments}): ...\n")
    assert f"{hook} is a coroutine function" in str(error)


def test_a_library_is_not_offered_as_a_module():
    with pytest.raises(UnknownPluginError) as caught:
        engine_entry("yaml")
    assert "-p yaml" not in str(caught.value.hint)
    assert "pip install dynamo-worker-yaml" in str(caught.value.hint)


@pytest.mark.parametrize(("name", "library"), [("json", "Python's standard library"), ("yaml", "the library ")])
def test_a_library_is_not_imported_for_its_name(name, library):
    with pytest.raises(UnknownPluginError, match=library) as caught:
        check(name)
    assert f"pip install dynamo-worker-{name}" in str(caught.value.hint)
    assert "directory" not in str(caught.value.hint)


@pytest.mark.parametrize("engine", ["echo", "json"])
def test_a_library_that_is_loaded_as_a_module_is_named(engine):
    with pytest.raises(PluginError, match="'json' implements no hook: its module is that of Python's standard library"):
        Plugins.load(engine, modules=["json"])


def test_a_module_of_a_package_with_plugins_is_no_library(site):
    site.module("toy_plugin", toy_plugins.HOOKIMPL + toy_plugins.CREATE)
    site.install("toy-dist", engines={"toy": "toy_plugin"})
    (site.path / "toy_dist-1.0.dist-info" / "top_level.txt").write_text("toy_plugin\n")
    (record,), errors = check("toy_plugin")
    assert (record.status, errors) == ("ok", [])


def test_every_flag_of_the_worker_collides():
    parser = argparse.ArgumentParser(add_help=False)
    taken = [*SWITCHES, "--namespace", "--no-warmup", "--tcp-tls-key-path"]
    for flag in (*taken, "--config", "--mine"):
        parser.add_argument(flag, dest="x", action="store_true")
    assert colliding(parser, SimpleNamespace(claimed_flags=("--config",))) == taken
    assert colliding(parser, SimpleNamespace()) == [*taken, "--config"]
