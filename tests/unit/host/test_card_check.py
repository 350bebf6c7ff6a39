"""Which model cards frontends take for different ones."""

from __future__ import annotations

import json

import pytest

from dynamo_worker.host.discovery.card_check import differences


def entry(**changes):
    """Return an entry as the runtime writes it, with these changes."""
    card = {
        "display_name": "m",
        "worker_type": "aggregated",
        "tokenizer": {"hf_tokenizer_json": {"path": "http://one", "checksum": "blake3:t"}},
        "chat_template_file": {"hf_chat_template": {"is_custom": True, "file": {"path": "a", "checksum": "blake3:c"}}},
        "context_length": 4096,
        "kv_cache_block_size": 16,
        "needs": [],
        "runtime_config": {"total_kv_blocks": 100},
    }
    return json.dumps({"type": "Model", "card_json": {**card, **changes}}).encode()


TEMPLATE = {"hf_chat_template": {"is_custom": True, "file": {"path": "a", "checksum": "blake3:d"}}}


@pytest.mark.parametrize(
    ("changes", "items"),
    [
        ({"chat_template_file": TEMPLATE}, ["chat_template_file"]),
        ({"chat_template_file": None}, ["chat_template_file"]),
        ({"context_length": 8192, "kv_cache_block_size": 32}, ["context_length", "kv_cache_block_size"]),
        ({"needs": [["prefill"]]}, ["needs"]),
    ],
)
def test_what_makes_a_card_another_one(changes, items):
    assert differences([entry()], [entry(), entry(**changes)]) == ("m", items)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": {"hf_tokenizer_json": {"path": "http://two", "checksum": "blake3:t"}}},
        {"runtime_config": {"total_kv_blocks": 50, "reasoning_parser": "qwen3"}},
        {"worker_type": "prefill", "context_length": 1},
        {"display_name": "other", "context_length": 1},
    ],
)
def test_what_does_not(changes):
    assert differences([entry()], [entry(**changes)]) is None


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"[" * 5000, b'{"card_json": 1}', b"\xff"])
def test_what_cannot_be_read_is_no_card(junk):
    assert differences([junk, entry()], [junk]) is None
    assert differences([junk], [entry(context_length=1)]) is None
