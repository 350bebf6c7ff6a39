"""What KV connectors are told on either side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from dynamo_worker import InvalidRequestError, StartError
from dynamo_worker.kit.canary import canary_request
from dynamo_worker_vllm.disaggregation import Role, connector, connectors


def role(mode: str, name: str | None = "NixlConnector") -> Role:
    config: Any = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=name, engine_id="e"))
    return Role(mode, config)


def transfer(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get("kv_transfer_params")


def test_a_prefill_worker_keeps_the_blocks_for_a_decode_worker() -> None:
    params = SamplingParams(max_tokens=50, min_tokens=5)
    role("prefill").prepare({"token_ids": [5]}, params)
    assert (params.max_tokens, params.min_tokens) == (1, 1)
    assert transfer(params)["do_remote_decode"] is True
    with pytest.raises(InvalidRequestError, match="only one answer"):
        role("prefill").prepare({"token_ids": [5]}, SamplingParams(n=2, temperature=1.0))


@pytest.mark.parametrize("connector", ["NixlConnector", "MooncakeConnector"])
def test_no_blocks_are_kept_for_a_canary(connector: str) -> None:
    """No decode worker ever fetches them: they would be held, and a drain would wait, until their lease expires."""
    prefill, params = role("prefill", connector), SamplingParams(max_tokens=1)
    prefill.prepare(canary_request(None, None), params)
    assert transfer(params) is None
    chunk: dict[str, Any] = {"token_ids": [1]}
    prefill.hand_over(chunk, params)
    assert chunk["disaggregated_params"] == {"kv_transfer_params": {}}


def test_a_decode_worker_fetches_them() -> None:
    handed_over = {"remote_block_ids": [1]}
    request = {"prefill_result": {"disaggregated_params": {"kv_transfer_params": handed_over}}}
    params = SamplingParams()
    role("decode").prepare(request, params)
    assert transfer(params) == handed_over
    alone = SamplingParams()
    role("decode").prepare({**request, "annotations": ["x-bypass-remote-prefill"]}, alone)
    assert transfer(alone) is None


def test_prefill_needs_a_connector() -> None:
    with pytest.raises(StartError, match="needs a KV connector") as raised:
        role("prefill", None)
    assert '"kv_role": "kv_producer"' in str(raised.value.hint)
    assert role("aggregated", None).needs == ()


def test_decode_without_one_computes_the_prompt_itself_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    decode = role("decode", None)
    assert "The decode worker computes every prompt itself" in caplog.text
    assert not decode.fetches
    assert role("decode").fetches
    params = SamplingParams()
    decode.prepare({"prefill_result": {"disaggregated_params": {"kv_transfer_params": {"remote_port": 1}}}}, params)
    assert transfer(params) is None


@pytest.mark.parametrize("wrapper", ["MultiConnector", "PdConnector"])
def test_connectors_that_combine_others(wrapper: str) -> None:
    parts = [{"kv_connector": "LMCacheConnectorV1"}, {"kv_connector": "NixlConnector"}]
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=wrapper, kv_connector_extra_config={"connectors": parts})
    )
    assert connectors(config) == ["LMCacheConnectorV1", "NixlConnector"]
    assert connector(config) == "NixlConnector"
    config.kv_transfer_config.kv_connector_extra_config = {}
    assert connectors(config) == [wrapper]
    config.kv_transfer_config = None
    assert connectors(config) == []
    assert connector(config) is None
