"""Parts of chunks: numbers and texts that JSON can carry."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.llm.exceptions import Disconnected

from dynamo_worker.kit import chunks


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_finite(value: float) -> None:
    assert chunks.finite(value) == chunks.LEAST_LOGPROB
    assert chunks.finite(-0.5) == -0.5


def test_usage() -> None:
    assert chunks.usage(3, 4, 2) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert chunks.usage(3, 4, 0)["prompt_tokens_details"] is None


def test_logprobs_are_json() -> None:
    assert chunks.top_logprob(7, -math.inf, 1, "ä") == {
        "rank": 1,
        "token_id": 7,
        "token": "ä",
        "logprob": chunks.LEAST_LOGPROB,
        "bytes": [195, 164],
    }
    # half a surrogate pair, as some tokenizers return for a part of a character
    json.dumps(chunks.top_logprob(7, -1.0, 2, "\ud800")["bytes"])
    assert chunks.top_logprob(7, -1.0, 2, None)["bytes"] is None
    assert chunks.prompt_logprob(-1.0, None, None) == {"logprob": -1.0}
    assert chunks.prompt_logprob(-math.inf, 3, "x") == {
        "logprob": chunks.LEAST_LOGPROB,
        "rank": 3,
        "decoded_token": "x",
    }


def test_texts_of_tokens() -> None:
    decode = chunks.token_decoder(SimpleNamespace(decode=lambda tokens: f"t{tokens}"))
    assert decode(7) == "t[7]"
    assert chunks.token_decoder(None)(7) is None


def test_a_request_for_no_tokens() -> None:
    assert chunks.no_tokens() == {"token_ids": [], "index": 0, "finish_reason": "length"}


def builder(**options: Any) -> chunks.ChunkBuilder:
    return chunks.ChunkBuilder("Toy", {"eos": "stop", "abort": "cancelled"}, prompt_tokens=3, **options)


def test_the_chunks_of_a_request() -> None:
    build = builder()
    assert build.chunk(1, [5, 6], []) == {"token_ids": [5, 6], "index": 1}
    last = build.chunk(0, [7], [])
    build.finish(last, "eos", 7, 2, ())
    assert last == {
        "token_ids": [7],
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": 7,
        "completion_usage": chunks.usage(3, 3, 2),
    }
    cancelled = build.chunk(1, [8], [])
    build.finish(cancelled, "abort", None, None, ())
    assert (cancelled["token_ids"], cancelled["finish_reason"], "stop_reason" in cancelled) == ([], "cancelled", False)


def test_log_probabilities_of_a_request() -> None:
    value = SimpleNamespace(logprob=-0.5, rank=1, decoded_token=None)
    build = builder(top=1, prompt_top=1, decode=lambda token: f"t{token}")
    chunk = build.chunk(0, [5], [{5: value}])
    assert chunk["log_probs"] == [-0.5]
    build.finish(chunk, "eos", None, None, [None, {3: value}])
    assert chunk["engine_data"]["prompt_logprobs"][1]["3"]["decoded_token"] == "t3"


def test_an_answer_that_the_engine_could_not_finish_may_migrate() -> None:
    with pytest.raises(Disconnected, match="Toy ended the request: error"):
        builder().finish({}, "error", None, None, ())
