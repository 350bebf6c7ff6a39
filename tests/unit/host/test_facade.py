"""`check`, and the facade that calls the hooks."""

from __future__ import annotations

import argparse
import asyncio
import re
import time

import pytest
from toy_plugins import CREATE, HOOKIMPL, engine, load

from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import EngineDeadError, StartError, UsageError
from dynamo_worker.host.plugins.facade import Plugins, check
from dynamo_worker.host.plugins.plugin_errors import PluginError


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


CONFIGURE = "@hookimpl\ndef add_arguments(parser): parser.add_argument('--{0}')\n"
CONFIGURE += "@hookimpl\ndef configure(args, context):\n    context.append(('{0}', args.toy, args.extra))\n"


def test_hook_configure_gets_the_flags_of_all(site):
    plugins = load(site, CONFIGURE.format("toy"), CONFIGURE.format("extra"))
    parser = argparse.ArgumentParser()
    plugins.add_arguments(parser)
    seen = []
    plugins.configure(parser.parse_args(["--toy", "1", "--extra", "2"]), seen)
    assert seen == [("toy", "1", "2"), ("extra", "1", "2")]


def test_hook_configure_may_refuse_a_flag(site):
    raised = "from dynamo_worker import UsageError\n@hookimpl\ndef configure(args): raise {}\n"
    with pytest.raises(UsageError, match="--size is too large"):
        load(site, "", raised.format("UsageError('--size is too large')")).configure(argparse.Namespace(), None)


def test_hook_configure_fails(site):
    plugins = load(site, "", "@hookimpl\ndef configure(args): raise OSError('no disk')\n")
    with pytest.raises(PluginError, match=r"plugin 'extra' from extra-dist 1.0 cannot be configured: OSError: no disk"):
        plugins.configure(argparse.Namespace(), None)


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
