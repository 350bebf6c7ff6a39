"""Discovery, loading and validation of plugins, and the facade that calls them."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import re
import sys
import time

import pluggy
import pytest

from dynamo_worker import __version__
from dynamo_worker.deadline import Deadline
from dynamo_worker.deprecation import deprecated
from dynamo_worker.errors import EngineDeadError, StartError, UsageError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.hookspecs import API_VERSION
from dynamo_worker.host import plugin_imports, plugin_validation
from dynamo_worker.host import plugins as host_plugins
from dynamo_worker.host.installed_plugins import discover
from dynamo_worker.host.plugin_errors import PluginError, UnknownPluginError
from dynamo_worker.host.plugins import Plugins, check

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


def row(name):
    (record,) = [record for record in discover() if record.name == name]
    return record


# --- Discovery


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


# --- What can be wrong with a plugin


def test_unknown_engine(site):
    site.install_engine()
    error = failure("toi", UnknownPluginError)
    assert "there is no engine 'toi', did you mean toy? (installed engines: echo, toy)" in str(error)
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
        ('"2"', f"needs version 2.0 of the plugin API; dynamo-worker {__version__} provides 1.1"),
        ("(1, 7)", f"needs version 1.7 of the plugin API; dynamo-worker {__version__} provides 1.1"),
        ("0", "needs version 0.0 of the plugin API"),
        ('"new"', "expected a version such as \"1.1\" as dynamo_worker_api, got 'new'"),
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
    assert "implements a hook 'clenup' that does not exist, did you mean cleanup?" in str(error)
    assert "toy_plugin.py:4" in str(error)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("cleanup(engine, dedline)", "argument 'dedline' that does not exist, did you mean deadline?"),
        ("cleanup(engine, deadline, extra=None)", "argument 'extra=None' that does not exist"),
        ("cleanup(*, engine)", "argument 'engine' of hook 'cleanup' must be an ordinary argument"),
        ("cleanup(**kw)", "argument '**kw' that does not exist"),
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


def test_what_is_not_loaded_is_listed_as_disabled(site):
    for name in ("extra", "other"):
        extension(site, "@hookimpl\ndef cleanup(engine): pass\n", name)
    status = {record.name: record.status for record in discover(allowed=["other"])}
    assert (status["extra"], status["other"], status["echo"]) == ("disabled", "installed", "installed")


# --- Local modules


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
    assert "there is no module 'no_such_module'" in str(failure("echo", UnknownPluginError, modules=["no_such_module"]))


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


# --- check


def test_check(site):
    site.install_engine()
    (record,), errors = check("toy")
    assert (record.status, record.hooks, errors) == ("ok", ("add_arguments", "create_engine"), [])


def test_check_finds_what_only_the_flags_show(site):
    engine(site, CREATE + "@hookimpl\ndef add_arguments(parser): parser.add_argument('x', bad=1)\n")
    (record,), (error,) = check("toy")
    assert record.status == "broken"
    assert "cannot add its flags: TypeError" in str(error)


def test_check_of_a_local_module(monkeypatch, site):
    monkeypatch.chdir(site.path)
    site.module("mine", HOOKIMPL + CREATE)
    (record,), _ = check("mine")
    assert record.kind == "engine"


@pytest.mark.parametrize("name", ["toi", "no-such", "no.such.module"])
def test_check_of_nothing(site, name):
    site.install_engine()
    with pytest.raises(UsageError, match="no engine, plugin or module"):
        check(name)


# --- The hooks

RECORDER = """
calls = []
"""


def load(site, engine_source="", extension_source=None):
    engine(site, CREATE + engine_source)
    if extension_source is not None:
        extension(site, extension_source)
    return Plugins.load("toy")


def test_hook_add_arguments(site):
    plugins = load(
        site,
        "@hookimpl\ndef add_arguments(parser): parser.add_argument('--a')\n",
        "@hookimpl\ndef add_arguments(parser): parser.add_argument('--b')\n",
    )
    parser = argparse.ArgumentParser()
    plugins.add_arguments(parser)
    assert vars(parser.parse_args(["--a", "1", "--b", "2"])) == {"a": "1", "b": "2"}


def test_hook_add_arguments_conflict_names_the_second_plugin(site):
    flags = "@hookimpl\ndef add_arguments(parser): parser.add_argument('--a')\n"
    plugins = load(site, flags, flags)
    with pytest.raises(PluginError, match=r"plugin 'extra' .* cannot add its flags: .*conflicting option string: --a"):
        plugins.add_arguments(argparse.ArgumentParser())


def test_hook_prepare_may_fail(site, caplog):
    prepare = "@hookimpl\ndef prepare(arguments):\n    arguments.append('begun')\n"
    plugins = load(site, prepare + "    raise OSError('no process')\n", prepare)
    arguments = ["--model"]
    plugins.prepare(arguments)
    assert arguments == ["--model", "begun", "begun"], "one that fails does not keep the next from it"
    assert "Plugin hook failed" in caplog.text


@pytest.mark.parametrize("error", ["SystemExit(0)", "BaseException('a panic')", "asyncio.CancelledError()"])
def test_what_is_no_exception_is_an_error_of_its_plugin(site, caplog, error):
    bodies = ("prepare(arguments)", "add_arguments(parser)")
    plugins = load(site, "import asyncio\n" + "".join(f"@hookimpl\ndef {body}: raise {error}\n" for body in bodies))
    plugins.prepare([])
    assert "Plugin hook failed" in caplog.text
    kind = error.partition("(")[0].removeprefix("asyncio.")
    with pytest.raises(PluginError, match=f"cannot add its flags: {kind}"):
        plugins.add_arguments(argparse.ArgumentParser())


@pytest.mark.parametrize(("hook", "argument"), [("prepare", "arguments"), ("add_arguments", "parser")])
def test_ctrl_c_passes_before_the_worker_takes_signals(site, hook, argument):
    plugins = load(site, f"@hookimpl\ndef {hook}({argument}): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        getattr(plugins, hook)(argparse.ArgumentParser())


def test_hook_create_engine(site):
    assert load(site).create_engine(argparse.Namespace(), None) == "engine"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "create_engine returned nothing"),
        ("raise ValueError('no model')", "cannot create the engine: ValueError: no model"),
        ("raise SystemExit(0)", "cannot create the engine: SystemExit: 0"),
        ("raise KeyboardInterrupt", "cannot create the engine: KeyboardInterrupt"),
        ("raise BaseException('a panic')", "cannot create the engine: BaseException: a panic"),
    ],
)
def test_hook_create_engine_fails(site, body, message):
    engine(site, f"@hookimpl\ndef create_engine(args, context): {body}\n")
    with pytest.raises(PluginError, match=re.escape(message)):
        Plugins.load("toy").create_engine(argparse.Namespace(), None)


def test_hook_create_engine_must_not_be_async(site):
    engine(site, "@hookimpl\nasync def create_engine(args, context): return 1\n")
    with pytest.raises(PluginError, match="it must be a plain function"):
        Plugins.load("toy").create_engine(argparse.Namespace(), None)


def test_hook_create_engine_keeps_the_engines_own_errors(site):
    engine(
        site,
        "from dynamo_worker.errors import StartError\n"
        "@hookimpl\ndef create_engine(): raise StartError('no GPU', hint='add one')\n",
    )
    with pytest.raises(StartError, match="no GPU") as caught:
        Plugins.load("toy").create_engine(argparse.Namespace(), None)
    assert not isinstance(caught.value, PluginError)


def test_hook_check_health(site):
    plugins = load(
        site,
        "@hookimpl\nasync def check_health(engine): engine.append('toy')\n",
        "@hookimpl\ndef check_health(engine): engine.append('extra')\n",
    )
    seen = []
    outcomes = asyncio.run(plugins.check_health(seen, timeout=1))
    assert [(outcome.plugin, outcome.ok) for outcome in outcomes] == [("toy", True), ("extra", True)]
    assert sorted(seen) == ["extra", "toy"]


def test_hook_check_health_unwell_is_an_outcome(site, caplog):
    plugins = load(
        site,
        "import asyncio\n@hookimpl\nasync def check_health(engine): await asyncio.sleep(60)\n",
        "@hookimpl\ndef check_health(engine): raise ValueError('odd')\n",
    )
    outcomes = asyncio.run(plugins.check_health(None, timeout=0.1))
    assert [type(outcome.error) for outcome in outcomes] == [TimeoutError, ValueError]
    assert not caplog.records, "judging and logging is the monitor's part"


def test_hook_check_health_dead_ends_the_wait(site):
    plugins = load(
        site,
        "import asyncio\n@hookimpl\nasync def check_health(engine): await asyncio.sleep(60)\n",
        "from dynamo_worker.errors import EngineDeadError\n"
        "@hookimpl\ndef check_health(engine): raise EngineDeadError('rank 3 is gone', hint='look')\n",
    )
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"rank 3 is gone \(health check of plugin 'extra'\)\n  next: look"):
        asyncio.run(plugins.check_health(None, timeout=30))
    assert time.monotonic() - started < 1


def test_hook_drain_is_concurrent_and_isolated(site, caplog):
    source = "import asyncio\n@hookimpl\nasync def drain(engine, deadline):\n    await asyncio.sleep(0.2)\n"
    plugins = load(site, source, source + "    raise OSError('full')\n")
    started = time.monotonic()
    outcomes = asyncio.run(plugins.drain(None, Deadline.after(5)))
    assert time.monotonic() - started < 0.35
    assert [(outcome.plugin, outcome.ok) for outcome in outcomes] == [("toy", True), ("extra", False)]
    (record,) = caplog.records
    assert record.fields["plugin"] == "extra"
    assert record.fields["error"] == "OSError: full"


def test_hook_drain_ends_at_its_deadline(site):
    plugins = load(site, "import asyncio\n@hookimpl\nasync def drain(deadline): await asyncio.sleep(60)\n")
    started = time.monotonic()
    asyncio.run(plugins.drain(None, Deadline.after(0.1)))
    assert time.monotonic() - started < 1


def test_hook_on_fatal_error(site):
    plugins = load(site, "@hookimpl\nasync def on_fatal_error(engine, error): engine.append(error)\n")
    seen, error = [], ValueError()
    asyncio.run(plugins.on_fatal_error(seen, error, Deadline.after(1)))
    assert seen == [error]


def test_hook_cleanup_runs_the_engines_plugin_last(site):
    plugins = load(
        site,
        "@hookimpl\nasync def cleanup(engine, deadline): engine.append('toy')\n",
        "@hookimpl\ndef cleanup(engine):\n    engine.append('extra')\n    raise ValueError\n",
    )
    seen = []
    outcomes = asyncio.run(plugins.cleanup(seen, Deadline.after(5)))
    assert seen == ["extra", "toy"]
    assert [(outcome.plugin, outcome.ok) for outcome in outcomes] == [("extra", False), ("toy", True)]


def test_hook_cleanup_goes_on_after_one_that_hangs(site):
    plugins = load(
        site,
        "@hookimpl\nasync def cleanup(engine, deadline): engine.append(deadline.remaining())\n",
        "import asyncio\n@hookimpl\nasync def cleanup(engine): await asyncio.sleep(60)\n",
    )
    seen = []
    asyncio.run(plugins.cleanup(seen, Deadline.after(1)))
    assert seen[0] > 0.2


def test_sync_wrappers_see_every_call(site):
    plugins = load(
        site,
        "@hookimpl\ndef drain(engine): engine.append('toy')\n",
        "@hookimpl(wrapper=True)\ndef drain(engine):\n    engine.append('before')\n    return (yield)\n",
    )
    seen = []
    outcomes = asyncio.run(plugins.drain(seen, Deadline.after(1)))
    assert seen == ["before", "toy"]
    assert [outcome.plugin for outcome in outcomes] == ["toy"]


def test_records_are_json(site):
    from dataclasses import asdict

    assert json.dumps([asdict(record) for record in discover()])


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


# --- Versions of the API


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
    assert "implements a hook 'on_scale' that does not exist (" in str(error)
    assert "@hookimpl(optionalhook=True)" in error.hint
    assert error.record.status == "incompatible"


def test_an_optional_hook_that_exists_is_checked_like_any_other(site):
    engine(site, CREATE + "@hookimpl(optionalhook=True)\ndef drain(engin): pass\n")
    assert "argument 'engin' that does not exist, did you mean engine?" in str(failure())


# --- Deprecations


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


# --- Names that have moved

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


def test_check_shows_deprecations(site, command):
    engine(
        site,
        "import warnings\nfrom dynamo_worker.deprecation import deprecated\n"
        "warnings.warn(deprecated('usage()', since='1.1', use='count()'), stacklevel=1)\n" + CREATE,
    )
    result = command("check", "toy")
    assert result.returncode == 0
    assert "engine 'toy' from toy-dist 1.0: warning: usage() is deprecated since API 1.1" in result.stdout


# --- Where it went wrong


def test_the_line_of_the_plugin_is_named_when_the_kit_raises(site):
    engine(site, "from dynamo_worker.kit import translation\ntranslation.integer('x')\n" + CREATE)
    assert "toy_plugin.py:3" in str(failure())


def test_hook_on_ready(site, caplog):
    source = "@hookimpl\nasync def on_ready(engine, info):\n    engine.append(info)\n"
    plugins = load(site, source, source + "    raise OSError('no route')\n")
    seen = []
    outcomes = asyncio.run(plugins.on_ready(seen, "info", 1))
    assert seen == ["info", "info"]
    assert [(outcome.plugin, outcome.ok) for outcome in outcomes] == [("toy", True), ("extra", False)]
    (record,) = caplog.records
    assert (record.fields["hook"], record.fields["plugin"]) == ("on_ready", "extra")


def test_hook_on_ready_that_hangs_is_cancelled(site):
    plugins = load(site, "import asyncio\n@hookimpl\nasync def on_ready(engine): await asyncio.sleep(60)\n")
    started = time.monotonic()
    (outcome,) = asyncio.run(plugins.on_ready(None, None, 0.1))
    assert isinstance(outcome.error, TimeoutError)
    assert time.monotonic() - started < 1
