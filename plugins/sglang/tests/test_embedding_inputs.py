"""The inputs of requests for embeddings: SGLang's own tokenizer, and what its scheduler would not survive."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import EngineContext, InvalidRequestError
from dynamo_worker_sglang.embeddings import SglangEmbeddingEngine
from dynamo_worker_sglang.manager import Manager


def tokenized(model: Path, most_tokens: int = 64, **request: Any) -> list[list[int]]:
    """Return the tokens of a request's inputs."""
    from transformers import AutoTokenizer

    manager = Manager.__new__(Manager)
    manager.tokenizer = AutoTokenizer.from_pretrained(model)
    manager.async_dynamic_batch_tokenizer = None
    manager.model_config = SimpleNamespace(is_embedding_gemma=False)
    engine = SglangEmbeddingEngine(Namespace(), EngineContext("a.b", model, supervised=False))
    engine._most_tokens = most_tokens
    started: Any = SimpleNamespace(manager=manager)
    inputs: Any = {"model": "m", **request}
    return asyncio.run(engine._tokenized(started, inputs))


@pytest.mark.parametrize("count", [1, 2, 100])
def test_texts_and_tokens_keep_their_order(tiny_model: Path, count: int) -> None:
    (alone,) = tokenized(tiny_model, inputs=["The quick brown fox"])
    assert tokenized(tiny_model, inputs=["The quick brown fox", [5, 6]] * count) == [alone, [5, 6]] * count


@pytest.mark.parametrize("words", [1, 1000])
def test_texts_that_are_too_long_or_nothing(tiny_model: Path, words: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"^input\[1\] has \d+ tokens; the model's context length is 3$"):
        tokenized(tiny_model, 3, inputs=["fox", "The quick brown fox jumps " * words])


@pytest.mark.parametrize("field", [{"truncate_prompt_tokens": 3}, {"add_special_tokens": False}])
def test_what_sglang_does_not_do(tiny_model: Path, field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(field))} is not supported"):
        tokenized(tiny_model, inputs=["fox"], **field)
