"""A class that cannot be run is refused with the reason."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from conftest import SAMPLE
from dynamo_worker import EngineContext, StartError, UsageError
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import WorkerError
from dynamo_worker_dynamo import arguments, engine_class
from dynamo_worker_dynamo.engine import DynamoEngine
from dynamo_worker_dynamo.side_effects import undone

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Cluster


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    arguments.add(parser)
    return parser.parse_args(list(words))


async def start(directory: Path, *words: str, ours: tuple[str, ...] = ()) -> Any:
    """Start an engine and shut it down; return what it says about itself."""
    engine = DynamoEngine(
        parse(*ours, "--engine-class", *words), EngineContext("test.backend", directory, supervised=False)
    )
    try:
        return await engine.start(7)
    finally:
        await engine.shutdown(Deadline.after(5))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["no_such_module:Engine"], StartError, "there is no module 'no_such_module'"),
        (["engine_classes:Engine"], StartError, "has no Engine; it has CountingEngine, Failing, FailingStart, Lacking"),
        (["engine_classes:NUMBER"], StartError, "expected a class, got int"),
        (["engine_classes:EngineDeadError"], StartError, "not an LLMEngine"),
        (["dynamo.common.backend:RawEngine"], StartError, "it generates media"),
        (["dynamo.common.backend:BaseEngine"], StartError, "only a BaseEngine"),
        (["engine_classes:Lacking"], StartError, "does not implement cleanup, from_args, generate, start"),
        (
            ["engine_classes:Failing", "raise"],
            StartError,
            "from_args failed: LookupError: no such model in the catalog",
        ),
        (["engine_classes:Failing", "package"], StartError, "package 'a_package_that_nobody_has', which is not inst"),
        (
            ["engine_classes:Failing", "nothing"],
            StartError,
            "must return an LLMEngine and a WorkerConfig, got 'nothing'",
        ),
        (["engine_classes:Failing", "help"], StartError, "has ended its own start"),
        (["engine_classes:Failing", "exit"], UsageError, "refuses its flags"),
        (["engine_classes:CountingEngine"], UsageError, "arguments are required: --model"),
        (["engine_classes:CountingEngine", "--model=m", "-x"], UsageError, "unrecognized arguments: -x"),
        (["engine_classes:FailingStart", "--model=m"], StartError, "failed to start: MemoryError: no room for the we"),
        (["dynamo.tokenspeed.llm_engine:TokenspeedLLMEngine"], StartError, "package '[a-z]+', which is not installed"),
    ],
    ids=lambda value: value[0] + "".join(value[1:]) if isinstance(value, list) else "-",
)
def test_a_class_that_cannot_run(words: list[str], kind: type[WorkerError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        asyncio.run(start(tmp_path, *words))


@pytest.mark.parametrize("words", [[], ["engine_classes"], ["--model", "m"], ["a:b c"]])
def test_a_class_that_is_not_named(words: list[str]) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("--engine-class", *words)


def test_no_class(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--engine-class is missing"):
        DynamoEngine(parse(), EngineContext("test.backend", tmp_path, supervised=False))


def test_the_flags_after_the_class_are_its_own() -> None:
    args = parse("--engine-processes", "core", "--engine-class", "a.b:C", "--x", "1", "--engine-class", "y")
    assert (args.engine_class, args.class_arguments) == ("a.b:C", ("--x", "1", "--engine-class", "y"))
    assert args.disaggregation_mode == "aggregated"
    assert parse("--engine-class", "a:B", "--disaggregation-mode", "prefill").disaggregation_mode == "prefill"
    assert parse("--engine-class", "a:B", "--disaggregation-mode", "strange").disaggregation_mode == "aggregated"


@pytest.mark.parametrize("words", [["--engine-processes", "("], ["--refuse-fields", "n,max_tokens"]])
def test_wrong_values_of_our_flags(words: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*words)


@pytest.mark.parametrize(
    ("version", "message"), [("1.5.0", "ai-dynamo 1.5.0 does not fit ai-dynamo-runtime"), (None, "'ai-dynamo', which")]
)
def test_versions_that_do_not_fit(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def found(name: str) -> str:
        if name != "ai-dynamo":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(StartError, match=message):
        engine_class.check_versions()


def test_a_version_that_was_not_tested(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine_class.check_versions()
    assert not caplog.records
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.7.0")
    engine_class.check_versions()
    assert "not tested" in caplog.text


def test_processes_that_the_class_does_not_start(model: Path, tmp_path: Path) -> None:
    words = ("engine_classes:CountingEngine", f"--model={model}")
    with pytest.raises(StartError, match="has started no such process"):
        asyncio.run(start(tmp_path, *words, ours=("--engine-processes", "no_such")))


def test_what_a_class_says_about_itself(model: Path, tmp_path: Path) -> None:
    info = asyncio.run(start(tmp_path, SAMPLE, "--model-name", str(model)))
    assert (info.model_name, info.model_path, info.worker_type) == (str(model), str(model), "aggregated")
    assert (info.context_length, info.kv_block_size, info.total_kv_blocks) == (2048, 16, 1000)
    assert (info.max_num_seqs, info.max_num_batched_tokens, info.data_parallel_size) == (64, 2048, 1)
    assert info.vocab_size == 3257
    assert info.runtime_config["kv_event_publishing_enabled"] is True
    encode = asyncio.run(start(tmp_path, SAMPLE, "--model-name", str(model), "--disaggregation-mode", "encode"))
    assert (encode.worker_type, encode.runtime_config["kv_event_publishing_enabled"]) == ("encode", False)
    prefill = asyncio.run(
        start(tmp_path, SAMPLE, f"--model-name={model}", "--disaggregation-mode=prefill", "--route-to-encoder")
    )
    assert (prefill.worker_type, tuple(prefill.needs)) == ("prefill", (("decode",), ("encode",)))
    counting = asyncio.run(start(tmp_path, "engine_classes:CountingEngine", "--model", str(model)))
    assert (counting.model_name, counting.model_aliases) == ("counting", ("numbers",))
    assert (counting.runtime_data, counting.endpoint_types) == ({"made": "here"}, ("completions", "chat"))


def test_what_a_class_leaves_is_killed(model: Path, tmp_path: Path) -> None:
    """Its cleanup hangs; what it has started is gone at the deadline, with some time to spare."""
    args = parse("--engine-class", "engine_classes:CountingEngine", f"--model={model}", "--hang")

    async def check() -> None:
        engine = DynamoEngine(args, EngineContext("test.backend", tmp_path, supervised=False))
        await engine.start(7)
        process = engine.inner.process
        assert list(engine.processes()) == [process.pid]
        deadline = Deadline.after(1)
        await engine.shutdown(deadline)
        assert not deadline.passed
        assert await asyncio.wait_for(process.wait(), 5) == -signal.SIGKILL

    asyncio.run(check())


def test_what_a_class_does_to_the_process_is_undone() -> None:
    root, before = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level, sys.excepthook)
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def run() -> None:
        from engine_classes import take_over

        with undone():
            take_over()
            assert sys.excepthook is print

    asyncio.run(run())
    assert (root.handlers, root.level, sys.excepthook) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == signals


def test_the_worker_ends_with_the_reason(cluster: Cluster) -> None:
    """Exit code 2, and what the class's own parser says; nothing is printed past the worker's log."""
    worker = cluster.start_worker("--no-such-flag")
    assert worker.wait_gone(30) == 2
    assert "unrecognized arguments: --no-such-flag" in worker.log
    assert "Traceback" not in worker.log
    assert "usage:" not in worker.log
