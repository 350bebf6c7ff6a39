"""Priority, session, ranks, cache salt, KV hints and LoRA adapter of a request."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import request_metadata


def test_priority() -> None:
    assert request_metadata.priority({"routing": {"priority": 3}}) == 3
    assert request_metadata.priority({"routing": None}) is None
    with pytest.raises(InvalidRequestError, match="priority"):
        request_metadata.priority({"routing": {"priority": "high"}})


@pytest.mark.parametrize(
    "where",
    [
        {"routing": {"cache_salt": "s"}},
        {"nvext": {"cache_salt": "s"}},
        {"extra_args": {"nvext": {"cache_salt": "s"}}},
    ],
)
def test_cache_salt(where: dict[str, Any]) -> None:
    assert request_metadata.cache_salt(where) == "dynamo-cache-salt:s"
    assert request_metadata.cache_salt({}) is None
    for wrong in (3, "s" * 1025):
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            request_metadata.cache_salt({"routing": {"cache_salt": wrong}})


def test_data_parallel_ranks() -> None:
    request = {"routing": {"dp_rank": 1, "prefill_dp_rank": 2}}
    assert (request_metadata.dp_rank(request), request_metadata.prefill_dp_rank(request)) == (1, 2)
    assert request_metadata.dp_rank({}) is None
    for name, read in (("dp_rank", request_metadata.dp_rank), ("prefill_dp_rank", request_metadata.prefill_dp_rank)):
        with pytest.raises(InvalidRequestError, match=rf"routing\.{name}: expected a data-parallel rank, got -1"):
            read({"routing": {name: -1}})


def test_kv_hints_are_bounded() -> None:
    assert request_metadata.kv_hint({"kv_hint": {"actions": []}}) == {"actions": []}
    assert request_metadata.kv_hint({}) is None
    with pytest.raises(InvalidRequestError, match="kv_hint: 20000 values"):
        request_metadata.kv_hint({"kv_hint": {"actions": [1] * 19_999}})


def test_session() -> None:
    assert request_metadata.session_id({"agent_context": {"session_id": " a "}}) == "a"
    assert request_metadata.session_id({"agent_context": {"session_id": ""}}) is None
    with pytest.raises(InvalidRequestError, match="session_id: 1025 characters"):
        request_metadata.session_id({"agent_context": {"session_id": "a" * 1025}})


def test_the_routers_adapter_comes_before_the_model() -> None:
    assert request_metadata.lora_name({"model": "m", "routing": {"lora_name": "a"}}) == "a"
    assert request_metadata.lora_name({"model": "m"}) == "m"
    assert request_metadata.lora_name({"model": None}) is None
