"""SGLang's real command line: names, abbreviations, and the flags of Dynamo's own worker."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynamo_worker.cli.engine_parser import EngineParser, engine_parser, parse_engine_args
from dynamo_worker.cli.peer_words import peer_flags
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host.config.own_flags import own_flags
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.plugin import plugin

RECORDED = Path(__file__).parents[3] / "tests" / "unit" / "data" / "peer_flags.json"

#: The engine's import alone takes many seconds on a busy machine.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def parser() -> EngineParser:
    return engine_parser(Plugins.load("sglang", (), ("none",)))


def test_the_engine_claims_all_flags_that_the_worker_has_too(parser: EngineParser) -> None:
    assert own_flags().keys() & set(parser.flags) == parser.declared.claimed


def test_no_flag_of_dynamos_worker_is_unknown(parser: EngineParser) -> None:
    for flag, row in peer_flags("sglang").items():
        if row.verdict == "honoured" and row.engines and not flag.startswith("--no-"):
            assert flag in parser.flags, flag


def test_the_record_of_the_peers_flags_is_its_own() -> None:
    peer = pytest.importorskip("dynamo.sglang.backend_args", reason="needs ai-dynamo, installed with --no-deps")
    from dynamo.common.configuration.groups.router_args import add_worker_router_arguments
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup

    real = argparse.ArgumentParser(add_help=False)
    DynamoRuntimeArgGroup().add_arguments(real)
    peer.DynamoSGLangArgGroup().add_arguments(real)
    add_worker_router_arguments(real)
    flags = {flag for action in real._actions for flag in action.option_strings}
    assert flags == set(json.loads(RECORDED.read_text())["sglang"])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--tp", "2"], "tp_size", 2),
        (["--dp", "2"], "dp_size", 2),
        (["--mem-fraction", "0.5"], "mem_fraction_static", 0.5),
        (["--disaggregation-mode", "agg"], "disaggregation_mode", "null"),
        (["--disaggregation-mode=pd"], "disaggregation_mode", "null"),
        (["--disaggregation-mode", "prefill"], "disaggregation_mode", "prefill"),
        (["--disable-piecewise-cuda-graph"], "cuda_graph_backend_prefill", "disabled"),
        (["--sglang-trace-level", "3"], "sglang_trace_level", 3),
    ],
)
def test_words(parser: EngineParser, words: list[str], name: str, value: object) -> None:
    assert getattr(parse_engine_args(parser, ["--model-path", "m", *words], None), name) == value


@pytest.mark.parametrize("flag", ["--tp", "--dp", "--mem-fraction", "--context-l", "--chunked-p"])
def test_abbreviations_are_the_engines_own(parser: EngineParser, flag: str) -> None:
    real = argparse.ArgumentParser(add_help=False)
    arguments._server_args().add_cli_args(real)
    value = "0.5" if flag == "--mem-fraction" else "1"
    words = ["--model-path", "m", flag, value]
    expected = vars(real.parse_args(words)) | {"disaggregation_bootstrap_port": None}
    given = vars(parse_engine_args(parser, words, None))
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tpp", "2"], "unknown flag --tpp"),
        (["--ep-s", "2"], None),
        (["--enable-d", "x"], "--enable-d is ambiguous: it may stand for "),
        (["--disaggregation-mode", "encode"], "--disaggregation-mode encode is not supported"),
        (["--load-format", "gms"], "--load-format gms is not supported"),
        (["--enable-multimodal"], "--enable-multimodal is not supported"),
        (["--dedicated-mm-encoder"], "--dedicated-mm-encoder is not supported"),
    ],
)
def test_refusals(parser: EngineParser, words: list[str], message: str | None) -> None:
    if message is None:
        parse_engine_args(parser, ["--model-path", "m", *words], None)
        return
    with pytest.raises(UsageError) as caught:
        parse_engine_args(parser, ["--model-path", "m", *words], None)
    assert str(caught.value.args[0]).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--embedding-worker", "--disaggregation-mode", "decode"], "cannot be combined with --disaggregation-mode: "),
        (["--is-embedding", "--enable-rl", "--publish-kv-events"], "with --publish-kv-events, --enable-rl: "),
        (["--use-sglang-tokenizer"], "--use-sglang-tokenizer is not supported: the frontend tokenizes"),
    ],
)
def test_flags_that_exclude_each_other(parser: EngineParser, tmp_path: Path, words: list[str], message: str) -> None:
    args = parse_engine_args(parser, ["--model-path", "m", *words], None)
    with pytest.raises(StartError) as caught:
        arguments.configure(args, tmp_path)
    assert message in str(caught.value.args[0])


@pytest.mark.parametrize("words", [["--is-embedding"], ["--embedding-worker", "--use-sglang-tokenizer"]])
def test_one_kind_of_engine_for_both_flags(parser: EngineParser, words: list[str]) -> None:
    args = parse_engine_args(parser, ["--model-path", "m", *words], None)
    assert plugin.engine_class(args) == "dynamo_worker_sglang.embeddings:SglangEmbeddingEngine"


def test_what_scripts_have_and_no_worker_needs(parser: EngineParser, tmp_path: Path) -> None:
    words = ["--model-path", "m", "--skip-tokenizer-init", "--served-model-name", "x,y z", "--load-format", "dummy"]
    args = parse_engine_args(parser, words, None)
    ServerArgs = arguments._server_args()  # noqa: N806 - a class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerArgs, "from_cli_args", lambda given: given)
        settings = arguments.configure(args, tmp_path)
    assert (settings.skip_tokenizer_init, settings.served_model_name) == (False, "x")
    assert args.served_model_aliases == ["y", "z"]


def test_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("tp: 2\nmodel-path: m\nenable-metrics: true\n")
    argv = ["--reasoning-parser", "qwen3", "--dyn-reasoning-parser", "deepseek_r1", "--tool-call-parser", "hermes"]
    argv += ["--config", "s.yaml", "--log-level", "debug", "--disaggregation-mode", "prefill", "--print-config"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    result = subprocess.run(
        [sys.executable, "-m", "dynamo_worker", "--engine", "sglang", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=inherited | {"DYN_COMPONENT": "worker"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load(result.stdout)
    assert (values["component"], values["reasoning_parser"], values["tool_call_parser"]) == (
        "prefill",
        "deepseek_r1",
        None,
    )
    engine = values["engine_args"]
    assert (engine["reasoning_parser"], engine["tool_call_parser"], engine["log_level"]) == ("qwen3", "hermes", "debug")
    assert (engine["tp_size"], engine["model_path"], engine["enable_metrics"]) == (2, "m", True)
