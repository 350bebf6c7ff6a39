"""vLLM's real command line: names, abbreviations, and the flags of Dynamo's own worker."""

from __future__ import annotations

import json
import os
import re
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
from dynamo_worker_vllm import arguments

RECORDED = Path(__file__).parents[3] / "tests" / "unit" / "data" / "peer_flags.json"

#: The engine's import alone takes many seconds on a busy machine.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def parser() -> EngineParser:
    return engine_parser(Plugins.load("vllm", (), ("none",)))


def test_the_engine_claims_all_flags_that_the_worker_has_too(parser: EngineParser) -> None:
    assert own_flags().keys() & set(parser.flags) == parser.declared.claimed


def test_no_flag_of_dynamos_worker_is_unknown(parser: EngineParser) -> None:
    for flag, row in peer_flags("vllm").items():
        if row.verdict == "honoured" and row.engines and not flag.startswith("--no-"):
            assert flag in parser.flags, flag


def test_the_record_of_the_peers_flags_is_its_own() -> None:
    peer = pytest.importorskip("dynamo.vllm.backend_args", reason="needs ai-dynamo, installed with --no-deps")
    import argparse

    from dynamo.common.configuration.groups.router_args import add_worker_router_arguments
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup

    real = argparse.ArgumentParser(add_help=False)
    DynamoRuntimeArgGroup().add_arguments(real)
    peer.DynamoVllmArgGroup().add_arguments(real)
    add_worker_router_arguments(real)
    flags = {flag for action in real._actions for flag in action.option_strings}
    assert flags == set(json.loads(RECORDED.read_text())["vllm"])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--tensor-par", "2"], "tensor_parallel_size", 2),
        (["--max_model", "9"], "max_model_len", 9),
        (["--data_parallel_size", "2"], "data_parallel_size", 2),
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["-O3"], "optimization_level", 3),
        (["--disaggregation-mode", "agg"], "disaggregation_mode", "aggregated"),
        (["--disaggregation-mode=pd"], "disaggregation_mode", "aggregated"),
        (["--disaggregation-mode", "decode"], "disaggregation_mode", "decode"),
        (["--headless", "--no-headless"], "headless", False),
        (["--embedding-worker"], "embedding_worker", True),
        (["--embedding-worker", "--no-embedding-worker"], "embedding_worker", False),
        (["--embedding-frontend-tokenization"], "embedding_frontend_tokenization", True),
    ],
)
def test_words(parser: EngineParser, words: list[str], name: str, value: object) -> None:
    parsed = getattr(parse_engine_args(parser, ["--model", "m", *words], None), name)
    assert str(parsed) == str(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "2"], "^unknown flag --tp, did you mean -tp\\?$"),
        (["--enable-l", "x"], "--enable-l is ambiguous: it may stand for "),
        (["--disaggregation-mode", "encode"], "^--disaggregation-mode encode is not supported"),
        (["--load-format", "gms"], "^--load-format gms is not supported"),
        (["--route-to-encoder"], "^--route-to-encoder is not supported: .* start no encode worker"),
        (["--frontend-decoding"], "^--frontend-decoding is not supported: .* loads and decodes images itself"),
    ],
)
def test_refusals(parser: EngineParser, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_engine_args(parser, words, None)
    assert re.search(message, str(caught.value.args[0]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--embedding-worker", "--disaggregation-mode", "prefill"], "cannot be combined with --disaggregation-mode: "),
        (["--embedding-worker", "--enable-rl", "--publish-kv-events"], "with --publish-kv-events, --enable-rl: "),
        (["--embedding-worker", "--runner", "generate"], "^--embedding-worker needs a model that runs for pooling"),
        (["--embedding-worker", "--embedding-frontend-tokenization", "--use-vllm-tokenizer"], "exclude each other"),
        (["--embedding-frontend-tokenization"], "^--embedding-frontend-tokenization needs --embedding-worker$"),
        (["--use-vllm-tokenizer"], "^--use-vllm-tokenizer is not supported: the frontend tokenizes$"),
    ],
)
def test_flags_that_exclude_each_other(parser: EngineParser, tmp_path: Path, words: list[str], message: str) -> None:
    parsed = parse_engine_args(parser, ["--model", "m", *words], None)
    with pytest.raises(StartError) as caught:
        arguments.configure(parsed, tmp_path)
    assert re.search(message, str(caught.value.args[0]))


def test_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("tensor-parallel-size: 2\nserved-model-name: [a]\n")
    argv = ["--model", "m", "--reasoning-parser", "qwen3", "--dyn-reasoning-parser", "deepseek_r1"]
    argv += ["--config", "v.yaml", "--log-level", "DEBUG", "--served-model-name", "x,y z", "--print-config"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    result = subprocess.run(
        [sys.executable, "-m", "dynamo_worker", "--engine", "vllm", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=inherited | {"DYN_NAMESPACE_WORKER_SUFFIX": "s", "DYN_COMPONENT": "worker"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load(result.stdout)
    assert (values["namespace"], values["component"], values["reasoning_parser"]) == (
        "dynamo-s",
        "backend",
        "deepseek_r1",
    )
    engine = values["engine_args"]
    assert (engine["reasoning_parser"], engine["log_level"]) == ("qwen3", "DEBUG")
    assert engine["tensor_parallel_size"] == 2
    assert engine["served_model_name"] == ["x,y z"]
