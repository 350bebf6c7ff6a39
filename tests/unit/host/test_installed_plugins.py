"""Installed plugins are found through their metadata, without importing them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from toy_plugins import extension

from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.installed_plugins import discover


def row(name):
    (record,) = [record for record in discover() if record.name == name]
    return record


def test_discovery_imports_nothing(site):
    site.install_engine()
    record = row("toy")
    assert (record.dist, record.version, record.value, record.status) == ("toy-dist", "1.0", "toy_plugin", "installed")
    assert str(record) == "engine 'toy' from toy-dist 1.0"
    assert "toy_plugin" not in sys.modules


def test_the_built_in_engine_is_found_like_any_other():
    assert row("echo").dist == "dynamo-worker"


def test_broken_plugins_are_rows(site):
    site.install("gone-dist", engines={"gone": "no_such_module_anywhere"})
    site.install("odd-dist", plugins={"odd": "not a reference"})
    assert (row("gone").status, row("odd").status) == ("missing", "broken")
    site.install_engine()
    assert Plugins.load("toy", disabled=["odd"]).engine_name == "toy", "a broken plugin that was not chosen is no error"


def test_disabled_plugin_is_a_row(site):
    extension(site, "1 / 0")
    assert [record.status for record in discover(["extra"]) if record.name == "extra"] == ["disabled"]


def test_two_packages_with_one_name_are_two_rows(site):
    site.install_engine()
    site.install("other-dist", "2.0", engines={"toy": "other"})
    rows = [record for record in discover() if record.name == "toy"]
    assert [record.status for record in rows] == ["ambiguous", "ambiguous"]
    assert rows[0].error == "toy-dist 1.0 offers the same name"


def test_what_is_not_loaded_is_listed_as_disabled(site):
    for name in ("extra", "other"):
        extension(site, "@hookimpl\ndef cleanup(engine): pass\n", name)
    status = {record.name: record.status for record in discover(allowed=["other"])}
    assert (status["extra"], status["other"], status["echo"]) == ("disabled", "installed", "installed")


def test_records_are_json(site):

    assert json.dumps([asdict(record) for record in discover()])
