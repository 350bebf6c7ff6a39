"""The canary request: one token, from whatever the model's prompts begin with."""

from __future__ import annotations

from types import SimpleNamespace

from dynamo_worker.kit import canary


def test_a_canary() -> None:
    tokenizer, config = SimpleNamespace(bos_token_id=None, eos_token_id=3), SimpleNamespace(bos_token_id=[1, 2])
    assert canary.canary_request(tokenizer, config)["token_ids"] == [3]
    assert canary.canary_request(tokenizer, SimpleNamespace(bos_token_id=7))["token_ids"] == [7]
    both = SimpleNamespace(bos_token_id=5), SimpleNamespace(bos_token_id=7)
    assert canary.canary_request(*both, prompt_tokens=2)["token_ids"] == [5, 5]
    assert canary.canary_request(None, None)["token_ids"] == [0]
    assert canary.canary_request(None, None)["stop_conditions"]["max_tokens"] == 1
    assert canary.is_canary(canary.canary_request(None, None))
    assert not canary.is_canary({"token_ids": [0]})
