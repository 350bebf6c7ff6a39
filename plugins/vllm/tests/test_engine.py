"""Whose fault an error of vLLM is: the client's, vLLM's, or a bug."""

from __future__ import annotations

import argparse
import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.serving import LocalContext
from dynamo_worker_vllm.engine import VllmEngine, _finished, _translated

BUGS = [ValueError("not enough values to unpack"), TypeError("not iterable"), KeyError("a")]


def submitted(error: Exception) -> BaseException:
    """Return what becomes of an error while a request is handed to vLLM."""

    async def add_request(*_: Any, **__: Any) -> None:
        raise error

    engine = VllmEngine(argparse.Namespace(), None)  # type: ignore[arg-type]
    llm: Any = SimpleNamespace(add_request=add_request, engine_core=SimpleNamespace(engine_ranks_managed=[0]))
    engine._llm = llm
    submit = engine._submit(llm, {"token_ids": [5]}, SamplingParams(), LocalContext("r"), None)  # type: ignore[arg-type]
    with pytest.raises(BaseException) as raised:
        asyncio.run(submit)
    return raised.value


@pytest.mark.parametrize("error", [VLLMValidationError("too long"), ValueError("top_k must be positive")])
def test_what_vllm_refuses_is_the_clients_fault(error: Exception) -> None:
    refused = submitted(error)
    assert isinstance(refused, InvalidRequestError)
    assert str(error) in str(refused)


@pytest.mark.parametrize("error", BUGS[1:], ids=repr)
def test_a_bug_while_it_takes_a_request_is_not(error: Exception) -> None:
    assert submitted(error) is error


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_behind_that_is_not_either(error: Exception) -> None:
    assert _translated(error) is error


def test_what_vllm_says_of_itself() -> None:
    assert isinstance(submitted(VllmDeadError()), EngineDeadError)
    assert isinstance(submitted(QueueOverflowError()), WorkerUnavailable)


@pytest.mark.parametrize(("model", "highest", "limit"), [(100, 98, 100), (100, 119, 120), (100, None, 100)])
def test_the_vocabulary_is_what_vllm_takes(model: int, highest: int | None, limit: int) -> None:
    """The model may know more tokens than its tokenizer, and the other way round."""
    engine = VllmEngine(argparse.Namespace(), None)  # type: ignore[arg-type]
    config: Any = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: model))
    tokenizer = None if highest is None else SimpleNamespace(max_token_id=highest)
    engine._config = config
    engine._llm = SimpleNamespace(tokenizer=tokenizer)  # type: ignore[assignment]
    assert engine._vocab_size == limit


def test_a_request_that_vllm_gives_up_goes_to_another_worker_and_the_others_stay() -> None:
    """A frontend keeps an EngineShutdown against the whole worker for 5 s."""
    with pytest.raises(Disconnected, match="vLLM ended the request: error"):
        _finished({"token_ids": [], "finish_reason": "error"})
    assert _finished({"token_ids": [1], "finish_reason": "stop"})["finish_reason"] == "stop"
