"""Operations and flags that touch what requests or operators name: vLLM itself is not started."""

from __future__ import annotations

import argparse
import asyncio
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import EngineContext, StartError
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker_vllm import arguments
from dynamo_worker_vllm.control import Control
from dynamo_worker_vllm.plugin import plugin


def operate(name: str, body: dict[str, Any], paths: AllowedPaths) -> tuple[dict[str, Any], list[Any]]:
    """Return the answer of an operation, and what reached vLLM."""
    calls: list[Any] = []

    async def remember(value: Any) -> None:
        calls.append(value)

    llm: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(lora_config=object()), start_profile=remember, stop_profile=None, add_lora=remember
    )
    context = EngineContext("test.backend", Path("/nowhere"), supervised=False, allowed_paths=paths)
    return asyncio.run(Control(llm, context, ("tiny",)).routes()[name](body)), calls


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/b", 3])
def test_the_prefix_of_a_profile_leads_nowhere_else(prefix: object) -> None:
    answer, calls = operate("start_profile", {"profile_prefix": prefix}, AllowedPaths())
    assert "expected a name" in answer["message"]
    assert not calls


@pytest.mark.parametrize("prefix", [None, "run-1"])
def test_a_profile(prefix: str | None) -> None:
    assert operate("start_profile", {"profile_prefix": prefix}, AllowedPaths())[1] == [prefix]


def test_adapters_are_loaded_from_where_the_operator_allows_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    body = {"lora_name": "poet", "source": {"uri": f"file://{tmp_path}"}}
    answer, calls = operate("load_lora", body, AllowedPaths())
    assert "--control-load-root DIR allows a directory" in answer["message"]
    assert not calls
    answer, (request,) = operate("load_lora", body, AllowedPaths([str(tmp_path)]))
    assert answer["status"] == "success"
    assert request.lora_path == str(tmp_path)


@pytest.mark.parametrize("flags", [("--interleave-mm-strings",), ("--default-mm-loras", '{"image": "/x"}')])
def test_flags_that_nobody_reads_are_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    with pytest.raises(StartError, match="no effect in a worker") as raised:
        arguments.configure(parser.parse_args(["--model", "m", *flags]), tmp_path)
    assert flags[0] in str(raised.value)


@pytest.mark.parametrize("given", ["raw_logprobs", "processed_logprobs"])
def test_trainers_get_the_logprobs_of_what_was_sampled(given: str) -> None:
    engine_args = SimpleNamespace(logprobs_mode=given)
    arguments._report_sampled_logprobs(engine_args)
    assert engine_args.logprobs_mode == "processed_logprobs"


def test_trainers_get_no_others() -> None:
    with pytest.raises(StartError, match="trainers need --logprobs-mode processed_logprobs, not raw_logits"):
        arguments._report_sampled_logprobs(SimpleNamespace(logprobs_mode="raw_logits"))


def test_the_plugin_names_what_there_is() -> None:
    for path in (plugin.engine, plugin.headless_engine, plugin.arguments, plugin.preload):
        assert callable(pkgutil.resolve_name(path))
