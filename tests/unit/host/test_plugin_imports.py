"""Names that plugins imported from an earlier release: one error says what to import now."""

from __future__ import annotations

import argparse
import importlib
import importlib.util

import pytest
from toy_plugins import CREATE, engine, failure

from dynamo_worker import __version__
from dynamo_worker.host.plugins import plugin_imports
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_errors import PluginError

MOVED_MODULES = sorted(plugin_imports._MOVED.items())


def imports(site, statement, **options):
    engine(site, f"{statement}\n{CREATE}", **options)
    error = failure()
    assert error.record.status == "incompatible"
    assert "toy_plugin.py:2" in str(error)
    assert error.hint == "upgrade toy-dist, or import what docs/plugins.md lists"
    return str(error)


@pytest.mark.parametrize(("old", "new"), MOVED_MODULES)
def test_modules_that_have_moved(site, old, new):
    expected = f"engine 'toy' from toy-dist 1.0 imports 'dynamo_worker.{old}', which is 'dynamo_worker.{new}' since 0.2"
    assert expected in imports(site, f"from dynamo_worker.{old} import anything")
    assert importlib.util.find_spec(f"dynamo_worker.{new}") is not None
    assert importlib.util.find_spec(f"dynamo_worker.{old}") is None


@pytest.mark.parametrize("old", sorted(plugin_imports._PRIVATE))
def test_modules_that_are_private_now(site, old):
    expected = f"imports 'dynamo_worker.{old}', which is private to the worker since 0.2"
    assert expected in imports(site, f"import dynamo_worker.{old}")
    assert importlib.util.find_spec(f"dynamo_worker.{old}") is None


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "from dynamo_worker.operations import Operations, Presence",
            (
                "imports 'dynamo_worker.operations', which is 'dynamo_worker.kit.engine_control' since 0.2; "
                "Operations is now EngineControl; Presence is now DiscoveryGate (step_out, step_in and step_aside: "
                "withdraw, rejoin and withdrawn_for)"
            ),
        ),
        ("from dynamo_worker.kit.engine_control import Operations", "imports 'Operations' from 'dynamo_worker.kit."),
        ("from dynamo_worker.kit.engine_control import Operations", "which is EngineControl since 0.2"),
        ("from dynamo_worker.kit.engine_control import Operation", "is dynamo_worker.engine.Operation since 0.2"),
        (
            "from dynamo_worker.adapters import Adapters",
            "'dynamo_worker.kit.lora' since 0.2; Adapter is now LoraAdapter",
        ),
        ("from dynamo_worker.kit.lora import Adapters", "which is LoraAdapters since 0.2"),
        ("from dynamo_worker.kit import lora\nlora.Adapters", "which is LoraAdapters since 0.2"),
        ("from dynamo_worker import translation", "which is 'dynamo_worker.kit.translation' since 0.2"),
        ("from dynamo_worker import launcher", "which is private to the worker since 0.2"),
        ("from dynamo_worker.serving import pulled", "pulled is now dynamo_worker.kit.push_engine.pulled"),
        ("from dynamo_worker.serving import pulled", "LocalContext is now dynamo_worker.engine.LocalContext"),
        ("from dynamo_worker.metrics import PrefixCollector", "now dynamo_worker.kit.metrics.PrefixCollector"),
        ("from dynamo_worker.registration import changing", "changing is now EngineContext.discovery"),
        ("import dynamo_worker.kit.nonsense", f"which dynamo-worker {__version__} does not have"),
        ("from dynamo_worker.kit.lora import Nonsense", f"which dynamo-worker {__version__} does not have"),
    ],
)
def test_names_that_have_moved(site, statement, expected):
    if "\n" in statement:
        statement = statement.replace("\n", "; ")
    assert expected in imports(site, statement)


def test_replacements_exist():
    for module, names in plugin_imports._RENAMED.items():
        for old, new in names.items():
            new = new.partition(" ")[0]
            if new == "EngineContext.discovery":
                continue
            place, _, name = (new if "." in new else f"dynamo_worker.{module}.{new}").rpartition(".")
            assert hasattr(importlib.import_module(place), name)
            if importlib.util.find_spec(f"dynamo_worker.{module}"):
                assert old not in vars(importlib.import_module(f"dynamo_worker.{module}"))


@pytest.mark.parametrize(
    "statement",
    ["import json.nonsense", "from json import nonsense", "import json; json.nonsense", "import dynamo_workers.x"],
)
def test_other_imports_that_fail_have_their_own_messages(site, statement):
    engine(site, f"{statement}\n{CREATE}")
    assert "since 0.2" not in str(failure())
    assert "docs/plugins.md" not in failure().hint


def test_names_that_an_engine_imports_late(site):
    """Most plugins import their engine in a hook."""
    engine(site, "@hookimpl\ndef create_engine(args, context):\n    from dynamo_worker import routing\n")
    with pytest.raises(PluginError, match=r"imports 'dynamo_worker.routing', which is 'dynamo_worker.kit.publishing'"):
        Plugins.load("toy").create_engine(argparse.Namespace(), None)


@pytest.mark.parametrize("line", [["--engine", "toy"], ["check", "toy"], ["--engine", "toy", "--help"]])
def test_every_command_says_what_to_import_now(site, command, line):
    engine(site, f"from dynamo_worker.translation import integer\n{CREATE}")
    result = command(*line)
    assert result.returncode == (0 if "--help" in line else 3), result.stderr
    assert (
        "engine 'toy' from toy-dist 1.0 imports 'dynamo_worker.translation', which is "
        "'dynamo_worker.kit.translation' since 0.2"
    ) in result.stderr
    assert result.stderr.count("since 0.2") <= 2, "one message; the supervisor repeats it as the reason of the exit"
    assert "Traceback" not in result.stderr
