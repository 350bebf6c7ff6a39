"""What makes an object a plugin: its API version, its hooks and their arguments."""

from __future__ import annotations

import argparse
import asyncio
import sys

import pytest
from toy_plugins import CREATE, HOOKIMPL, engine, extension, failure, load

from dynamo_worker import __version__
from dynamo_worker.deadline import Deadline
from dynamo_worker.hookspecs import API_VERSION
from dynamo_worker.host.plugins import plugin_validation
from dynamo_worker.host.plugins.facade import Plugins

HERE = ".".join(map(str, API_VERSION))


def test_class_instead_of_object(site):
    site.module("toy_plugin", "class Plugin: pass\n")
    site.install("toy-dist", engines={"toy": "toy_plugin:Plugin"})
    error = failure()
    assert "expected a module or an object, got the class toy_plugin:Plugin" in str(error)
    assert "plugin = Plugin()" in str(error)


@pytest.mark.parametrize("declared", ['"1"', '"1.0"', "1", "(1, 0)", '"1.0.7"'])
def test_compatible_api(site, declared):
    engine(site, f"dynamo_worker_api = {declared}\n" + CREATE)
    assert Plugins.load("toy").engine.status == "ok"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ('"2"', f"needs version 2.0 of the plugin API; dynamo-worker {__version__} provides {HERE}"),
        ("(1, 7)", f"needs version 1.7 of the plugin API; dynamo-worker {__version__} provides {HERE}"),
        ("0", "needs version 0.0 of the plugin API"),
        ('"new"', f"expected a version such as \"{HERE}\" as dynamo_worker_api, got 'new'"),
    ],
)
def test_incompatible_api(site, declared, message):
    engine(site, f"dynamo_worker_api = {declared}\n" + CREATE)
    error = failure()
    assert message in str(error)
    assert error.record.status == "incompatible"


def test_upgrade_hint_names_the_older_side(site):
    engine(site, "dynamo_worker_api = 2\n" + CREATE)
    assert failure().hint == "upgrade dynamo-worker, or install an older toy-dist"
    sys.modules.pop("toy_plugin")
    site.module("toy_plugin", HOOKIMPL + "dynamo_worker_api = 0   \n" + CREATE)
    assert failure().hint == "upgrade toy-dist: API 0 is no longer supported"


def test_unknown_hook(site):
    engine(site, CREATE + "@hookimpl\ndef clenup(engine): pass\n")
    error = failure()
    assert "implements an unknown hook 'clenup', did you mean cleanup?" in str(error)
    assert "toy_plugin.py:4" in str(error)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("cleanup(engine, dedline)", "unknown argument 'dedline', did you mean deadline?"),
        ("cleanup(engine, deadline, extra=None)", "unknown argument 'extra=None'"),
        ("cleanup(*, engine)", "argument 'engine' of hook 'cleanup' must be an ordinary argument"),
        ("cleanup(**kw)", "unknown argument '**kw'"),
    ],
)
def test_hook_with_wrong_arguments(site, definition, message):
    engine(site, CREATE + f"@hookimpl\ndef {definition}: pass\n")
    error = failure()
    assert message in str(error)
    assert "cleanup(engine, deadline)" in str(error)


def test_wrapper_that_is_no_generator(site):
    engine(site, CREATE + "@hookimpl(wrapper=True)\ndef cleanup(): pass\n")
    assert "cannot be registered" in str(failure())


def test_engine_without_create_engine(site):
    engine(site, "@hookimpl\ndef cleanup(engine): pass\n")
    assert "does not implement the hook create_engine" in str(failure())


def test_engine_that_forgot_the_marker(site):
    engine(site, "def create_engine(args, context): pass\n")
    assert "its function of that name is not marked with @hookimpl" in str(failure())


def test_extension_without_hooks(site):
    extension(site, "def cleanup(engine): pass\n")
    assert "plugin 'extra' from extra-dist 1.0 implements no hook" in str(failure("echo"))


def test_extension_that_is_an_engine(site):
    extension(site, CREATE)
    assert "belongs in the group dynamo_worker.engines" in str(failure("echo"))


@pytest.fixture
def newer_core(monkeypatch):
    """A core that provides the next minor version of the API; returns the version that this one provides."""
    monkeypatch.setattr(plugin_validation, "API_VERSION", (API_VERSION[0], API_VERSION[1] + 1))
    return ".".join(map(str, API_VERSION))


FUTURE = "@hookimpl(optionalhook=True)\ndef on_scale(engine, replicas): raise AssertionError('nobody calls it')\n"


@pytest.mark.parametrize("declared", [None, str(API_VERSION[0]), ".".join(map(str, API_VERSION))])
def test_a_plugin_that_spans_two_minor_versions_runs_on_the_older_one(site, declared):
    """It implements a hook that only the next minor version has."""
    declaration = f'dynamo_worker_api = "{declared}"\n' if declared else ""
    plugins = load(site, declaration + FUTURE + "@hookimpl\ndef drain(engine): engine.append('toy')\n")
    assert plugins.engine.hooks == ("create_engine", "drain")
    assert plugins.create_engine(argparse.Namespace(), None) == "engine"
    seen = []
    asyncio.run(plugins.drain(seen, Deadline.after(1)))
    assert seen == ["toy"]


def test_a_plugin_for_the_older_minor_version_runs_on_the_newer_one(site, newer_core):
    engine(site, f'dynamo_worker_api = "{newer_core}"\n' + CREATE)
    assert Plugins.load("toy").engine.status == "ok"


def test_an_extension_with_nothing_but_hooks_of_the_next_version_does_nothing(site):
    extension(site, FUTURE)
    assert Plugins.load("echo").extensions[0].hooks == ()


def test_an_unknown_hook_that_is_not_optional_says_how_to_make_it_so(site):
    engine(site, CREATE + FUTURE.replace("(optionalhook=True)", ""))
    error = failure()
    assert "implements an unknown hook 'on_scale' (" in str(error)
    assert "@hookimpl(optionalhook=True)" in error.hint
    assert error.record.status == "incompatible"


def test_an_optional_hook_that_exists_is_checked_like_any_other(site):
    engine(site, CREATE + "@hookimpl(optionalhook=True)\ndef drain(engin): pass\n")
    assert "unknown argument 'engin', did you mean engine?" in str(failure())
