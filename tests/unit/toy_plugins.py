"""Toy plugins for tests: packages that a test installs, and what loading them raises."""

from __future__ import annotations

import pytest

from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_errors import PluginError

HOOKIMPL = "from dynamo_worker.hookspecs import hookimpl\n"


CREATE = "@hookimpl\ndef create_engine(args, context): return 'engine'\n"


def engine(site, source, name="toy", **options):
    site.module(f"{name}_plugin", HOOKIMPL + source)
    site.install("toy-dist", engines={name: f"{name}_plugin"}, **options)


def extension(site, source, name="extra"):
    site.module(f"{name}_plugin", HOOKIMPL + source)
    site.install(f"{name}-dist", plugins={name: f"{name}_plugin"})


def failure(name="toy", error=PluginError, **options):
    with pytest.raises(error) as caught:
        Plugins.load(name, **options)
    assert caught.value.hint, "every error says what to do next"
    return caught.value


def load(site, engine_source="", extension_source=None):
    engine(site, CREATE + engine_source)
    if extension_source is not None:
        extension(site, extension_source)
    return Plugins.load("toy")
