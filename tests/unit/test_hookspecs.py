"""The contract with plugin authors does not change by accident."""

from __future__ import annotations

import inspect

from dynamo_worker import hookspecs
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_validation import hook_signatures


def test_hooks_in_lifecycle_order():
    assert hook_signatures() == {
        "prepare": ("arguments",),
        "add_arguments": ("parser",),
        "configure": ("args", "context"),
        "create_engine": ("args", "context"),
        "on_ready": ("engine", "info"),
        "check_health": ("engine",),
        "drain": ("engine", "deadline"),
        "on_fatal_error": ("engine", "error", "deadline"),
        "cleanup": ("engine", "deadline"),
    }


def test_every_hook_is_documented_and_has_a_method_on_the_facade():
    for name, arguments in hook_signatures().items():
        text = inspect.getdoc(getattr(hookspecs, name))
        assert text
        for argument in arguments:
            assert f":param {argument}:" in text
        assert callable(getattr(Plugins, name))


def test_api_version():
    assert hookspecs.API_VERSION == (1, 2)
