"""Modules in the current directory: found by name, without the directory on the path."""

from __future__ import annotations

import asyncio
import sys

import pytest
from toy_plugins import CREATE, HOOKIMPL, failure

from dynamo_worker.deadline import Deadline
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_errors import PluginError, UnknownPluginError


def test_local_module_as_extension(tmp_path, monkeypatch, site):
    monkeypatch.chdir(site.path)
    site.module("mine", HOOKIMPL + "@hookimpl\ndef cleanup(engine): pass\n")
    plugins = Plugins.load("echo", modules=["mine", "mine"])
    assert [record.name for record in plugins.records] == ["echo", "mine"]


def test_local_module_as_engine(monkeypatch, site):
    monkeypatch.chdir(site.path)
    site.module("mine", HOOKIMPL + CREATE)
    assert Plugins.load("mine", modules=["mine"]).engine.kind == "engine"
    assert "use `-p mine --engine mine`" in str(failure("echo", modules=["mine"]))


def test_local_module_that_does_not_exist():
    assert "no module 'no_such_module'" in str(failure("echo", UnknownPluginError, modules=["no_such_module"]))


def test_local_file_instead_of_module():
    assert "use `-p mine`" in str(failure("echo", UnknownPluginError, modules=["./mine.py"]))


def test_extension_may_have_the_name_of_the_engine(site):
    site.module("toy_plugin", HOOKIMPL + CREATE)
    site.module("toy_extension", HOOKIMPL + "@hookimpl\ndef cleanup(engine): pass\n")
    site.install("toy-dist", engines={"toy": "toy_plugin"}, plugins={"toy": "toy_extension"})
    plugins = Plugins.load("toy")
    assert [record.name for record in plugins.records] == ["toy", "plugin:toy"]
    outcomes = asyncio.run(plugins.cleanup(None, Deadline.after(1)))
    assert [outcome.plugin for outcome in outcomes] == ["plugin:toy"]


def test_a_local_module_opens_nothing_else_of_its_directory(site, tmp_path, monkeypatch):
    directory = tmp_path / "here"
    directory.mkdir()
    (directory / "package").mkdir()
    (directory / "package" / "__init__.py").touch()
    (directory / "package" / "inner.py").write_text("from package import other\n" + HOOKIMPL + CREATE)
    (directory / "package" / "other.py").touch()
    (directory / "trap.py").write_text("raise SystemExit(9)")
    (directory / "wants.py").write_text("import trap\n")
    monkeypatch.chdir(directory)
    before = list(sys.path), list(sys.meta_path)
    assert Plugins.load("package.inner", ["package.inner"]).engine_name == "package.inner"
    with pytest.raises(PluginError, match="'trap'"):
        Plugins.load("echo", ["wants"])
    assert (sys.path, sys.meta_path) == before
