"""Choosing and importing plugins, and the deprecations that they use."""

from __future__ import annotations

import sys

import pluggy
import pytest
from toy_plugins import CREATE, engine, extension, failure, load

from dynamo_worker.deprecation import deprecated
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.plugins import facade as host_plugins
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_errors import UnknownPluginError


def test_unknown_engine(site):
    site.install_engine()
    error = failure("toi", UnknownPluginError)
    assert "unknown engine 'toi', did you mean toy? (installed engines: echo, toy)" in str(error)
    assert "pip install dynamo-worker-toi" in str(error)
    assert error.exit_code is ExitCode.USAGE


def test_no_engine_chosen():
    assert "choose one with --engine NAME" in str(failure("", UnknownPluginError))


def test_two_packages_offer_the_name(site):
    site.install_engine()
    site.install("other-dist", "2.0", engines={"toy": "other"})
    error = failure()
    assert "several packages offer the engine 'toy': other-dist 2.0 (other) and toy-dist 1.0 (toy_plugin)" in str(error)
    assert error.record.status == "ambiguous"
    assert error.exit_code is ExitCode.START_FAILED


def test_missing_dependency(site):
    engine(site, "import no_such_package.inner\n" + CREATE)
    error = failure()
    assert "engine 'toy' from toy-dist 1.0 needs the Python package 'no_such_package', which is not" in str(error)
    assert "toy_plugin.py:2" in str(error)
    assert "pip install no_such_package" in str(error)
    assert error.record.status == "missing"


def test_missing_dependency_that_comes_by_extra(site):
    engine(site, "import no_such_package\n" + CREATE, extras=["cuda", "cpu"])
    assert "`pip install 'toy-dist[cuda]'` or `pip install 'toy-dist[cpu]'`" in str(failure())


def test_module_missing_from_its_own_package(site):
    site.install("toy-dist", engines={"toy": "no_such_plugin_module"})
    error = failure()
    assert "its module 'no_such_plugin_module' is missing" in str(error)
    assert error.record.status == "missing"


def test_object_missing_from_its_module(site):
    site.module("toy_plugin", "")
    site.install("toy-dist", engines={"toy": "toy_plugin:plugin"})
    assert "names 'toy_plugin:plugin', but module 'toy_plugin' has no attribute 'plugin'" in str(failure())


def test_malformed_entry_point(site):
    site.install("toy-dist", engines={"toy": "not a reference"})
    assert "expected `module` or `module:object` as its entry point, got 'not a reference'" in str(failure())


def test_exception_on_import(site):
    engine(site, "1 / 0\n")
    error = failure()
    assert "cannot be imported: ZeroDivisionError: division by zero" in str(error)
    assert "toy_plugin.py:2" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.record.status == "broken"


def test_syntax_error(site):
    engine(site, "def (:\n")
    assert "toy_plugin.py:2" in str(failure())


def test_exit_on_import(site):
    engine(site, "import sys\nsys.exit('no GPU')\n")
    error = failure()
    assert "exited while it was being imported: SystemExit('no GPU')" in str(error)
    assert "toy_plugin.py:3" in str(error)


def test_interrupt_on_import_is_let_through(site):
    engine(site, "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        Plugins.load("toy")


def test_broken_extension_names_the_way_out(site):
    extension(site, "1 / 0")
    assert "--no-plugin extra" in str(failure("echo"))
    assert Plugins.load("echo", disabled=["extra"]).extensions == ()


def test_unknown_disabled_plugin(site):
    extension(site, "@hookimpl\ndef cleanup(engine): pass\n")
    error = failure("echo", UnknownPluginError, disabled=["exta"])
    assert "--no-plugin exta: no plugin of that name is installed, did you mean extra?" in str(error)


def test_only_the_extensions_that_are_listed_are_imported(site):
    for name in ("extra", "other"):
        extension(site, "@hookimpl\ndef cleanup(engine): pass\n", name)
    for allowed, loaded in ((["all"], ["extra", "other"]), (["other"], ["other"]), (["none"], [])):
        plugins = Plugins.load("echo", allowed=allowed)
        assert [record.name for record in plugins.extensions] == loaded
        for name in ("extra", "other"):
            assert (sys.modules.pop(f"{name}_plugin", None) is not None) == (name in loaded)
    assert plugins.engine.name == "echo", "the engine is loaded always"


def test_a_listed_extension_can_be_left_out_and_a_broken_one_unlisted(site):
    extension(site, "1 / 0")
    assert Plugins.load("echo", allowed=["none"]).extensions == ()
    assert Plugins.load("echo", allowed=["all"], disabled=["extra"]).extensions == ()


@pytest.mark.parametrize("name", ["extra", "echo"])
def test_a_listed_extension_that_is_not_installed(site, name):
    """An engine is none."""
    extension(site, "@hookimpl\ndef cleanup(engine): pass\n", "extras")
    error = failure("echo", UnknownPluginError, allowed=[name])
    assert f"--installed-plugins {name}: no plugin of that name is installed" in str(error)
    assert "installed plugins: extras" in error.hint


@pytest.fixture
def deprecating_core(monkeypatch):
    """A core that has deprecated one hook and one argument."""
    marker = pluggy.HookspecMarker("dynamo_worker")

    class Specs:
        @marker(warn_on_impl=deprecated("the hook 'prepare'", since="1.1", use="'create_engine'"))
        def prepare(self, arguments): ...

        @marker(warn_on_impl_args={"deadline": deprecated("the argument 'deadline'", since="1.1", use="'engine'")})
        def drain(self, engine, deadline): ...

        @marker(firstresult=True)
        def create_engine(self, args, context): ...

    def new_manager():
        manager = pluggy.PluginManager("dynamo_worker")
        manager.add_hookspecs(Specs)
        return manager

    monkeypatch.setattr(host_plugins, "new_manager", new_manager)


OLD_HOOK = "@hookimpl\ndef prepare(arguments): pass\n"


OLD_ARGUMENT = "@hookimpl\ndef drain(engine, deadline): pass\n"


@pytest.mark.filterwarnings("default")
def test_deprecations_name_the_plugin_and_the_place(site, deprecating_core, caplog):
    plugins = load(site, OLD_HOOK, OLD_ARGUMENT)
    plugins.log_deprecations()
    (hook,), (argument,) = plugins.engine.deprecations, plugins.extensions[0].deprecations
    assert hook.startswith(
        "the hook 'prepare' is deprecated since API 1.1 and goes away in API 2.0: use 'create_engine'"
    )
    assert "toy_plugin.py:4)" in hook
    assert argument.startswith("the argument 'deadline' is deprecated since API 1.1")
    assert "extra_plugin.py:2)" in argument
    assert [(record.fields["plugin"], record.fields["deprecation"]) for record in caplog.records] == [
        ("toy", hook),
        ("extra", argument),
    ]


@pytest.mark.filterwarnings("default")
def test_deprecated_names_that_a_plugin_uses_while_it_is_imported(site):
    engine(
        site,
        "import warnings\nfrom dynamo_worker.deprecation import deprecated\n"
        "warnings.warn(deprecated('usage()', since='1.1', use='count()'), stacklevel=1)\n" + CREATE,
    )
    (deprecation,) = Plugins.load("toy").engine.deprecations
    assert deprecation.startswith("usage() is deprecated since API 1.1")
    assert "toy_plugin.py:4)" in deprecation


def test_a_filter_may_turn_deprecations_into_errors(site, deprecating_core):
    """As the tests of this project and of plugins do."""
    engine(site, CREATE + OLD_HOOK)
    assert "cannot be registered: the hook 'prepare' is deprecated since API 1.1" in str(failure())


def test_what_is_not_deprecated_is_not_reported(site, caplog):
    plugins = load(site, OLD_HOOK)
    plugins.log_deprecations()
    assert not plugins.engine.deprecations
    assert not caplog.records


def test_a_worker_logs_deprecations(site, command):
    engine(
        site,
        "import warnings\nfrom dynamo_worker.deprecation import deprecated\n"
        "warnings.warn(deprecated('usage()', since='1.1', use='count()'), stacklevel=1)\n" + CREATE,
    )
    result = command("--engine", "toy", "--discovery-backend", "file", DYN_FILE_KV=str(site.path / "discovery"))
    assert result.returncode == 3, "a text is no engine"
    assert 'Plugin uses a deprecated API plugin=toy deprecation="usage() is deprecated since API 1.1' in result.stderr
    assert result.stderr.count("usage() is deprecated") == 1


def test_check_shows_deprecations(site, command):
    engine(
        site,
        "import warnings\nfrom dynamo_worker.deprecation import deprecated\n"
        "warnings.warn(deprecated('usage()', since='1.1', use='count()'), stacklevel=1)\n" + CREATE,
    )
    result = command("check", "toy")
    assert result.returncode == 0
    assert "engine 'toy' from toy-dist 1.0: warning: usage() is deprecated since API 1.1" in result.stdout


def test_the_line_of_the_plugin_is_named_when_the_kit_raises(site):
    engine(site, "from dynamo_worker.kit import translation\ntranslation.integer('x')\n" + CREATE)
    assert "toy_plugin.py:3" in str(failure())
