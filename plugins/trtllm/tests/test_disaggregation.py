"""What a prefill worker hands over, and what a decode worker takes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import Logprob

from dynamo_worker import InvalidRequestError, StartError
from dynamo_worker.kit.canary import canary_request
from dynamo_worker_trtllm.disaggregation import Role, pack, unpack

SETTINGS = {"cache_transceiver_config": {"backend": "DEFAULT"}}


def translated(n: int = 1) -> Any:
    return SimpleNamespace(params=SimpleNamespace(max_tokens=50, min_tokens=5, ignore_eos=False), n=n, options={})


def prefilled() -> DisaggregatedParams:
    return DisaggregatedParams(
        request_type="context_only",
        first_gen_tokens=[7],
        first_gen_log_probs=[{7: Logprob(-0.5, 1), 9: Logprob(-1.5, 2)}],
        ctx_request_id=3,
        opaque_state=b"\x00\xffwhere the blocks are",
        disagg_request_id=2**60,
    )


def test_a_prefill_worker_stops_after_the_prefill_and_hands_it_over() -> None:
    role, request = Role("prefill", SETTINGS), translated()
    role.prepare({"token_ids": [5]}, request)
    assert (request.params.max_tokens, request.params.min_tokens, request.params.ignore_eos) == (1, None, True)
    assert request.options["disaggregated_params"].request_type == "context_only"
    assert request.options["disaggregated_params"].disagg_request_id
    assert role.hand_over(request) is pack
    with pytest.raises(InvalidRequestError, match="only one answer"):
        role.prepare({"token_ids": [5]}, translated(n=2))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_canary_concerns_no_other_worker(mode: str) -> None:
    role, request = Role(mode, SETTINGS), translated()
    role.prepare(canary_request(None, None), request)
    assert request.options == {}
    assert role.hand_over(request) is None


def test_what_is_handed_over_arrives_as_it_was() -> None:
    packed = json.loads(json.dumps(pack(prefilled())))
    found = unpack(packed)
    assert found.request_type == "generation_only"
    for name in ("first_gen_tokens", "first_gen_log_probs", "ctx_request_id", "opaque_state", "disagg_request_id"):
        assert getattr(found, name) == getattr(prefilled(), name), name


def test_a_decode_worker_takes_it() -> None:
    role, request = Role("decode", SETTINGS), translated()
    given = {"prefill_result": {"disaggregated_params": {**pack(prefilled()), "worker_id": 5}}}
    role.prepare(given, request)
    assert request.options["disaggregated_params"].ctx_request_id == 3
    assert request.params.max_tokens == 50
    alone = translated()
    role.prepare({**given, "annotations": ["x-bypass-remote-prefill"]}, alone)
    assert alone.options == {}
    with pytest.raises(InvalidRequestError, match="expected a prefill worker's result"):
        role.prepare({"token_ids": [5]}, translated())


@pytest.mark.parametrize(
    "wrong",
    [
        {"opaque_state": "not base64!"},
        {"opaque_state": 5},
        {"first_gen_log_probs": [[{"token": 1}]]},
        {"first_gen_log_probs": [[5]]},
        {"first_gen_tokens": [[[[1]] * 200] * 200]},
        {"opaque_state": "A" * 10_000_000},
    ],
)
def test_what_is_no_prefill_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"prefill_result\.disaggregated_params"):
        unpack({**pack(prefilled()), **wrong})


def test_disaggregation_needs_a_transceiver() -> None:
    with pytest.raises(StartError, match="need a cache transceiver"):
        Role("decode", {})
    assert Role("aggregated", {}).needs == ()
