"""Flags of one name in worker and engine: an engine gets those that it claims, the worker all others."""

from __future__ import annotations

import pytest
import yaml

from dynamo_worker.cli.chosen_engine import ChosenEngine
from dynamo_worker.errors import UsageError
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.plugin_errors import PluginError

#: An engine whose command line is like SGLang's.
CLAIMING = """
    from dynamo_worker import EnginePlugin, hookimpl

    class Plugin(EnginePlugin):
        claimed_flags = ("--config", "--log-level", "--reasoning-parser", "--tool-call-parser")
        flags_file = "--config"
        abbreviated_flags = True

        @hookimpl
        def add_arguments(self, parser):
            for flag in (*self.claimed_flags, "--disaggregation-mode"):
                parser.add_argument(flag)
            parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
            parser.add_argument("--stall-detector")
            parser.add_argument("--names", nargs="+")
            parser.add_argument("--fast", action="store_true")
            parser.add_argument("--cache-config")
            parser.add_argument("--cache-size")

        @hookimpl
        def create_engine(self, args, context): ...

    plugin = Plugin()
    """
RUN = ("--no-supervise",)


@pytest.fixture
def claiming(site):
    site.module("claims_plugin", CLAIMING)
    site.install("claims-dist", engines={"claims": "claims_plugin:plugin"})


def printed(result):
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load(result.stdout)
    return values, values.get("engine_args", {})


FLAGS = ("--reasoning-parser", "a", "--tool-call-parser", "b", "--log-level", "debug")


def test_the_engine_gets_what_it_claims(command, claiming):
    own = ("--dyn-reasoning-parser", "c", "--dyn-tool-call-parser", "d", "--worker-log-level", "error")
    values, engine = printed(command("--engine", "claims", *FLAGS, *own, "--print-config"))
    assert (engine["reasoning_parser"], engine["tool_call_parser"], engine["log_level"]) == ("a", "b", "debug")
    assert (values["reasoning_parser"], values["tool_call_parser"], values["log_level"]) == ("c", "d", "error")


def test_with_other_engines_the_short_names_are_the_workers(command, site):
    site.install_engine()
    values, engine = printed(command("--engine", "toy", *FLAGS, "--print-config"))
    assert engine == {}
    assert (values["reasoning_parser"], values["tool_call_parser"], values["log_level"]) == ("a", "b", "debug")


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_wherever_the_engine_is_named(command, claiming, way):
    (command.directory / "w.yaml").write_text("engine: claims\nnamespace: n\n" if way == "file" else "namespace: n\n")
    argv = ["--worker-config", "w.yaml", "--reasoning-parser", "a", "--print-config"]
    environ = {"DYN_WORKER_ENGINE": "claims"} if way == "variable" else {}
    values, engine = printed(command(*(["--engine", "claims"] if way == "flag" else []), *argv, **environ))
    assert (engine["reasoning_parser"], values["reasoning_parser"], values["namespace"]) == ("a", None, "n")


def test_the_workers_file_may_name_the_engine_by_the_short_flag(command, claiming):
    (command.directory / "w.yaml").write_text("engine: claims\nnamespace: n\nengine_args: {tp: 4}\n")
    values, engine = printed(command("--config", "w.yaml", "--reasoning-parser", "a", "--print-config"))
    assert (values["namespace"], engine) == ("n", {"tp_size": 4, "reasoning_parser": "a"})
    values, _ = printed(command("--print-config", DYN_WORKER_CONFIG="w.yaml"))
    assert values["namespace"] == "n"


def test_variables_and_keys_are_the_workers(command, claiming):
    (command.directory / "w.yaml").write_text("tool_call_parser: t\nlog_level: error\n")
    result = command("--engine", "claims", "--worker-config", "w.yaml", "--print-config", DYN_REASONING_PARSER="r")
    values, engine = printed(result)
    assert engine == {}
    assert (values["reasoning_parser"], values["tool_call_parser"], values["log_level"]) == ("r", "t", "error")


def test_the_engines_own_file_of_flags(command, claiming):
    (command.directory / "e.yaml").write_text("tp: 2\nnames: [a, b]\nfast: true\nreasoning-parser: q\n")
    argv = ["--engine", "claims", "--print-config"]
    _, engine = printed(command(*argv, "--config", "e.yaml"))
    assert engine == {"tp_size": 2, "names": ["a", "b"], "fast": True, "reasoning_parser": "q"}
    _, engine = printed(command(*argv, "--tp", "3", "--config=e.yaml", "--reasoning-parser", "z"))
    assert (engine["tp_size"], engine["reasoning_parser"]) == (3, "z")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tq: 2", "--config e.yaml: unknown key 'tq'"),
        ("[1]", "the file of --config e.yaml: expected `key: value` pairs, got a list"),
        ("a: [", "the file of --config e.yaml, line 1"),
        ("disaggregation-mode: {", "is not valid YAML"),
    ],
)
def test_a_wrong_file_of_flags(command, claiming, text, message):
    (command.directory / "e.yaml").write_text(text)
    result = command("--engine", "claims", "--config", "e.yaml", *RUN)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "none.yaml"], "cannot read the file of --config none.yaml: No such file"),
        (["--config"], "--config requires a value: FILE"),
        (["--config", "a", "--config", "b"], "--config is given 2 times; expected one file"),
    ],
)
def test_no_file_of_flags(command, claiming, argv, message):
    result = command("--engine", "claims", *argv, *RUN)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_file_that_is_too_large(command, claiming):
    (command.directory / "e.yaml").write_text("#" * (1 << 20) + "\n")
    assert "too large: expected at most 1048576" in command("--engine", "claims", "--config", "e.yaml", *RUN).stderr


# --- Abbreviations


def test_the_beginning_of_a_flag(command, claiming):
    argv = ["--tp", "2", "--tensor-p=3", "--fa", "--disagg", "prefill", "--cache-c.a", "1", "--cache-c.l+", "x,y"]
    _, engine = printed(command("--engine", "claims", *argv, "--print-config"))
    assert (engine["tp_size"], engine["fast"], engine["disaggregation_mode"]) == (3, True, "prefill")
    assert engine["cache_config"] == '{"a": 1, "l": ["x", "y"]}'


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cache", "--cache is ambiguous: it may stand for --cache-config, --cache-size"),
        ("--stall", "--stall is ambiguous: it may stand for --stall-detector, --stall-timeout, --stall-timeout-busy"),
        ("--na", "--na is ambiguous: it may stand for --names, --namespace, --namespace-worker-suffix"),
        ("--stall-timeou", "unknown flag --stall-timeou, did you mean --stall-timeout?"),
        ("--t", "--t is ambiguous"),
        ("--", "unexpected argument '1'"),
        ("--xyz", "unknown flag --xyz\n"),
    ],
)
def test_an_abbreviation_never_hides_another_flag(command, claiming, flag, message):
    result = command("--engine", "claims", *RUN, flag, "1")
    assert result.returncode == 2
    assert message in result.stderr


def test_an_abbreviation_in_the_workers_file(command, claiming):
    (command.directory / "w.yaml").write_text("engine_args: {tp: 2}\n")
    assert printed(command("--engine", "claims", "--print-config", DYN_WORKER_CONFIG="w.yaml"))[1] == {"tp_size": 2}


# --- What a plugin may claim


@pytest.mark.parametrize("flags", ['("--engine",)', '("--config", "--worker-config")', '("--drain",)'])
def test_a_flag_without_another_name_cannot_be_claimed(site, flags):
    site.module("greedy_plugin", CLAIMING.replace("claimed_flags =", f"claimed_flags = {flags}\n        others =", 1))
    site.install("greedy-dist", engines={"greedy": "greedy_plugin:plugin"})
    with pytest.raises(PluginError, match=r"claims --.*, for which the worker has no other name"):
        _ = Plugins.load("greedy").engine_flags


def test_a_broken_engine_is_reported_when_it_is_loaded(site):
    site.install_engine(source="1 / 0")
    chosen = ChosenEngine(["--engine", "toy", "--config", "w.yaml"])
    assert chosen.line.values["config"] == "w.yaml"
    with pytest.raises(UsageError, match="cannot read the configuration file"):
        chosen.settings()


# --- The component


@pytest.mark.parametrize(
    ("argv", "environ", "component", "origin"),
    [
        ([], {}, "backend", "default"),
        (["--disaggregation-mode", "decode"], {}, "backend", "default"),
        (["--disaggregation-mode", "prefill"], {}, "prefill", "default of a prefill worker"),
        (["--disaggregation-mode", "prefill"], {"DYN_COMPONENT": "worker"}, "prefill", "default of a prefill worker"),
        (["--disaggregation-mode", "decode"], {"DYN_COMPONENT": "decode"}, "backend", "default"),
        ([], {"DYN_COMPONENT": "prefill"}, "backend", "default"),
        (["--disaggregation-mode", "prefill"], {"DYN_COMPONENT": "mine"}, "mine", "environment DYN_COMPONENT"),
        (["--disaggregation-mode", "prefill", "--component", "worker"], {}, "worker", "flag --component"),
        (["--disaggregation-mode", "prefill", "--endpoint", "dyn://a.b.c"], {}, "b", "flag --endpoint"),
    ],
)
def test_the_component_follows_the_role(command, claiming, argv, environ, component, origin):
    result = command("--engine", "claims", *argv, "--print-config", **environ)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("component:")]
    assert [part.strip() for part in line.split("#")] == [f"component: {component}", origin]
