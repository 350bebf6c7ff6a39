"""The block size that routers are told of a model with several kinds of layers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from dynamo_worker_vllm import load

CONFIGURED = 16


def full(size: int, kind: type[FullAttentionSpec] = FullAttentionSpec) -> KVCacheSpec:
    return kind(block_size=size, num_kv_heads=1, head_size=64, dtype=torch.float32)


def mamba(size: int) -> KVCacheSpec:
    return MambaSpec(block_size=size, shapes=((16, 64),), dtypes=(torch.float32,))


def sliding(size: int) -> KVCacheSpec:
    return SlidingWindowSpec(block_size=size, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=64)


def engine(*specs: KVCacheSpec) -> Any:
    """Return an engine with KV caches of these kinds, as far as it describes them: with vLLM's own manager."""
    groups = [KVCacheGroupSpec([f"layer-{number}"], spec) for number, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=16, kv_cache_tensors=[], kv_cache_groups=groups)
    largest = max(spec.block_size for spec in specs)
    smallest = min(spec.block_size for spec in specs)
    manager = KVCacheManager(config, 1024, largest, smallest, enable_caching=len({type(spec) for spec in specs}) > 1)
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_config=config, kv_cache_manager=manager))

    async def call(method: str) -> Any:
        return getattr(EngineCore, method)(core)

    return running(call)


def running(call: Any) -> Any:
    cache = SimpleNamespace(block_size=CONFIGURED)
    return SimpleNamespace(
        engine_core=SimpleNamespace(call_utility_async=call), vllm_config=SimpleNamespace(cache_config=cache)
    )


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([full(32)], 32),
        ([full(64, MLAAttentionSpec)], 64),
        ([mamba(256), full(64)], 64),
        ([sliding(32), full(64)], 64),
        ([mamba(256)], CONFIGURED),
    ],
    ids=["attention", "MLA", "Mamba and attention", "a window and attention", "Mamba"],
)
def test_it_is_that_of_full_attention(specs: list[KVCacheSpec], expected: int) -> None:
    assert asyncio.run(load.block_size(engine(*specs))) == expected


async def fail(_: str) -> Any:
    raise RuntimeError("no such utility")


async def hang(_: str) -> Any:
    await asyncio.sleep(60)


@pytest.mark.parametrize("call", [fail, hang])
def test_an_engine_that_does_not_say(
    call: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load, "_ANSWER_SECONDS", 0.05)
    assert asyncio.run(load.block_size(running(call))) == CONFIGURED
    assert "vLLM does not describe its KV caches" in caplog.text
