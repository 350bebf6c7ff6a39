"""The command line: TensorRT-LLM's own arguments, the peer's flags, and what comes of them together."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker import StartError
from dynamo_worker.cli.engine_parser import EngineParser, parse_engine_args
from dynamo_worker.errors import UsageError
from dynamo_worker_trtllm import arguments


def parsed(*words: str) -> Any:
    parser = EngineParser("trtllm")
    arguments.add(parser)
    return parse_engine_args(parser, words, None)


def settings(*words: str) -> dict[str, Any]:
    return arguments.configure(parsed("--model", "M", *words))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_only_what_is_given_is_passed_on() -> None:
    assert settings() == {"model": "M", "enable_iter_perf_stats": True}


def test_its_own_arguments_with_dashes_or_underscores() -> None:
    found = settings("--tensor-parallel-size", "2", "--max_seq_len=512", "--enable-attention-dp", "--revision", "12")
    assert (found["tensor_parallel_size"], found["max_seq_len"]) == (2, 512)
    assert found["enable_attention_dp"] is True
    assert found["revision"] == "12"  # a name, not a number
    assert settings("--enable-attention-dp", "false")["enable_attention_dp"] is False


def test_nested_settings_as_a_whole_or_by_key() -> None:
    for words in (
        ("--kv-cache-config", '{"dtype": "fp8", "tokens_per_block": 64}'),
        ("--kv-cache-config", "dtype: fp8\ntokens_per_block: 64"),
        ("--kv_cache_config.dtype", "fp8", "--kv-cache-config.tokens_per_block=64"),
        ("--kv-cache-config.dtype", "fp8", "--kv-block-size", "64"),
    ):
        assert settings(*words)["kv_cache_config"] == {"dtype": "fp8", "tokens_per_block": 64}


def test_the_peers_command_line(file: Path) -> None:
    """As in upstream's recipes for disaggregated serving."""
    file.write_text("backend: pytorch\nmax_batch_size: 16\nkv_cache_config: {free_gpu_memory_fraction: 0.8}\n")
    args = parsed(
        *("--model-path", "M", "--served-model-name", "name", "--extra-engine-args", str(file)),
        *("--disaggregation-mode", "prefill", "--modality", "text", "--publish-events-and-metrics"),
        *("--expert-parallel-size", "4", "--free-gpu-memory-fraction", "0.5", "--max-num-tokens", "1024"),
    )
    assert (args.served_model_name, args.disaggregation_mode, args.publish_kv_events) == ("name", "prefill", True)
    assert arguments.configure(args) == {
        "model": "M",
        "backend": "pytorch",
        "moe_expert_parallel_size": 4,
        "max_num_tokens": 1024,
        "max_batch_size": 16,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "event_buffer_max_size": 100_000},
        "enable_iter_perf_stats": True,
    }


def test_which_source_takes_precedence(file: Path) -> None:
    file.write_text("max_seq_len: 2\nmax_num_tokens: 2\nkv_cache_config: {tokens_per_block: 2, dtype: fp8}\n")
    words = ["--max-batch-size", "1", "--max-seq-len", "1", "--max-num-tokens", "1", "--kv-block-size", "1"]
    words += ["--free-gpu-memory-fraction", "0.5", "--extra-engine-args", str(file)]
    found = settings(*words, "--override-engine-args", '{"max_num_tokens": 3, "kv_cache_config": {"dtype": "auto"}}')
    assert (found["max_batch_size"], found["max_seq_len"], found["max_num_tokens"]) == (1, 2, 3)
    assert found["kv_cache_config"] == {"tokens_per_block": 2, "dtype": "auto", "free_gpu_memory_fraction": 0.5}
    found = settings(*words, "--trtllm.kv_cache_config.dtype", "auto", "--trtllm.max_num_tokens", "3")
    assert (found["max_num_tokens"], found["kv_cache_config"]["dtype"]) == (3, "auto")


@pytest.mark.parametrize("name", ["agg", "pd", "prefill_and_decode", "aggregated"])
def test_the_names_of_a_worker_for_both_phases(name: str) -> None:
    assert parsed("--disaggregation-mode", name).disaggregation_mode == "aggregated"
    assert parsed().disaggregation_mode == "aggregated"


def test_variables_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TRTLLM_MAX_BATCH_SIZE", "8")
    monkeypatch.setenv("DYN_TRTLLM_DISAGGREGATION_MODE", "decode")
    monkeypatch.setenv("DYN_TRTLLM_OVERRIDE_ENGINE_ARGS", '{"max_seq_len": 9}')
    assert parsed().disaggregation_mode == "decode"
    assert (settings()["max_batch_size"], settings()["max_seq_len"]) == (8, 9)
    assert settings("--max-batch-size", "4")["max_batch_size"] == 4


def test_events_are_kept_only_if_somebody_wants_them() -> None:
    assert "kv_cache_config" not in settings()
    assert settings("--publish-kv-events")["kv_cache_config"] == {"event_buffer_max_size": 100_000}
    chosen = settings("--publish-kv-events", "--kv-cache-config.event_buffer_max_size", "5")
    assert chosen["kv_cache_config"] == {"event_buffer_max_size": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-beam-width", "2"], "max_beam_width = 2 is not supported: .* beam search"),
        (["--backend", "tensorrt"], "backend = 'tensorrt' is not supported: .*PyTorch"),
        (["--orchestrator-type", "ray"], "orchestrator_type = 'ray' is not supported: .*MPI"),
        (["--num-postprocess-workers", "2"], "--num-postprocess-workers has no effect .*the frontend detokenizes"),
        (["--trtllm.reasoning_parser", "qwen3"], "--reasoning-parser has no effect .*the frontend"),
        (["--gather-generation-logits"], "--gather-generation-logits has no effect"),
        (["--max-batch-size", "x"], "the command line: max_batch_size: expected a valid integer.*, got 'x'"),
        (
            ["--kv-cache-config.tokens_per_blok", "8"],
            "the command line: unknown argument kv_cache_config.tokens_per_blok, did you mean tokens_per_block",
        ),
        (["--trtllm.max_batchsize", "8"], "--trtllm: unknown argument max_batchsize, did you mean max_batch_size"),
        (
            ["--override-engine-args", '{"kv_cache_config": {"dtyp": 1}}'],
            "--override-engine-args: unknown argument kv_cache_config.dtyp, did you mean dtype",
        ),
        (["--extra-engine-args", "/nowhere.yaml"], "--extra-engine-args /nowhere.yaml: .*No such file"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(StartError, match=message):
        settings(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--disaggregation-mode", "encode"],
            "encode is not supported: this plugin serves .* text; expected agg, prefill or decode",
        ),
        (["--disaggregation-mode", "decod"], "decod is unknown; expected agg, prefill or decode"),
        (["--modality", "multimodal"], "multimodal is not supported: this plugin serves models that generate text"),
        (["--guided-decoding-backend", "outlines"], "invalid choice: 'outlines' .*xgrammar"),
        (["--override-engine-args", "[1]"], "expected an object, got a list"),
        (["--kv-cache-config", "{"], "expected JSON or YAML, got '{'"),
        (["--max-batch-sise", "1"], "unknown flag --max-batch-sise, did you mean --max-batch-size"),
    ],
)
def test_what_is_no_flag_or_no_value_of_one(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parsed(*words)


def test_arguments_that_ask_for_nothing_are_no_reason_to_refuse_a_file(file: Path) -> None:
    file.write_text("num_postprocess_workers: 0\nmax_beam_width: 1\nbackend: pytorch\nreasoning_parser: null\n")
    assert settings("--extra-engine-args", str(file))["num_postprocess_workers"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batchsize: 4", "unknown argument max_batchsize, did you mean max_batch_size"),
        ("[1]", "expected an object, got a list"),
        ("a: [", "expected JSON or YAML"),
        ("\N{REPLACEMENT CHARACTER}\0", "expected JSON or YAML"),
        ("a" * (2**20 + 1), "expected at most 1048576 characters"),
    ],
)
def test_a_file_that_cannot_be_used(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(StartError, match=f"--extra-engine-args {file}: {message}"):
        settings("--extra-engine-args", str(file))


def test_an_empty_file(file: Path) -> None:
    file.write_text("# nothing\n")
    assert settings("--extra-engine-args", str(file)) == settings()


def test_a_model_is_needed_from_anywhere(file: Path) -> None:
    with pytest.raises(StartError, match=r"the model is missing\n  next: --model"):
        arguments.configure(parsed())
    file.write_text("model: N\n")
    assert arguments.configure(parsed("--extra-engine-args", str(file)))["model"] == "N"


@pytest.mark.parametrize("variable", ["TLLM_DISABLE_MPI", "TLLM_WORKER_USE_SINGLE_PROCESS"])
def test_an_engine_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(StartError, match=f"{variable}=1 is not supported"):
        settings()


def test_help_teaches_every_argument() -> None:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    parser = EngineParser("trtllm")
    arguments.add(parser)
    text = parser.format_help()
    for name in TorchLlmArgs.model_fields.keys() - set(arguments._NO_FLAGS):
        assert f"--{name.replace('_', '-')}" in text
    assert "precedence" in text
    assert "{xgrammar,llguidance}" in text
    assert "--tensor-parallel-size NUMBER" in text


def test_the_ranks_of_one_machine_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    parsed()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi.llm_args", None)
    with pytest.raises(StartError, match=r"TensorRT-LLM engine needs .*\n.*dynamo-worker-trtllm\[cuda\]"):
        parsed()
