"""Whose fault an error of vLLM is: the client's, vLLM's, or a bug."""

from __future__ import annotations

import argparse
import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.engine import LocalContext
from dynamo_worker.kit import media_settings
from dynamo_worker.kit.push_engine import Job
from dynamo_worker_vllm.engine import VllmEngine, _finished, translated, vocab_size
from dynamo_worker_vllm.sampling import GuidedParams, SamplingTable

#: As vLLM takes it.
PROMPT = {"prompt_token_ids": [5]}
BUGS = [ValueError("not enough values to unpack"), TypeError("not iterable"), KeyError("a")]


def engine() -> VllmEngine:
    parser = argparse.ArgumentParser()
    media_settings.add_flags(parser)
    parser.set_defaults(enable_multimodal=False)
    return VllmEngine(parser.parse_args([]), None)  # type: ignore[arg-type]


def job(request: dict[str, Any], params: Any, request_id: str = "r") -> Job:
    return Job(request, params, None, LocalContext(request_id), lambda _: None)


def submitted(error: Exception) -> BaseException:
    """Return what becomes of an error while a request is handed to vLLM."""

    async def add_request(*_: Any, **__: Any) -> None:
        raise error

    llm: Any = SimpleNamespace(add_request=add_request, engine_core=SimpleNamespace(engine_ranks_managed=[0]))
    submit = engine()._submit(llm, job({"token_ids": [5]}, SamplingParams()), PROMPT)
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
    assert translated(error) is error


def test_the_event_loop_runs_while_vllm_compiles_a_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds for some, and vLLM would do it in `add_request`, on the loop."""
    steps: list[str] = []
    compiling, go_on = threading.Event(), threading.Event()

    def verify_guide(self: Any, *what: Any) -> None:
        assert what == ("model", "backends", "tokenizer")
        compiling.set()
        assert go_on.wait(10)
        steps.append("compiled")

    async def add_request(*_: Any, **__: Any) -> str:
        steps.append("added")
        return "mailbox"

    monkeypatch.setattr(GuidedParams, "verify_guide", verify_guide)

    async def main() -> None:
        vllm = engine()
        config = SimpleNamespace(model_config="model", structured_outputs_config="backends")
        core = SimpleNamespace(engine_ranks_managed=[0])
        llm: Any = SimpleNamespace(add_request=add_request, vllm_config=config, tokenizer="tokenizer", engine_core=core)
        request = {"token_ids": [5], "sampling_options": {"guided_decoding": {"regex": "a"}}}
        params = SamplingTable({}, 100).translate(request)
        submitted = asyncio.ensure_future(vllm._submit(llm, job(request, params), PROMPT))
        while not compiling.is_set():
            await asyncio.sleep(0.001)
        steps.append("the loop runs")
        plain = SamplingTable({}, 100).translate({"token_ids": [5]})
        await vllm._submit(llm, job({"token_ids": [5]}, plain, "p"), PROMPT)
        go_on.set()
        assert await submitted == "mailbox"

    asyncio.run(main())
    assert steps == ["the loop runs", "added", "compiled", "added"]


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("reasoning_ended", {"extra_args": {"reasoning_ended": 3}}),
        ("dp_rank", {"routing": {"dp_rank": "0"}}),
        ("kv_hint", {"kv_hint": [1] * 20_000}),
    ],
)
def test_what_the_engine_core_could_not_decode_is_refused(name: str, sections: dict[str, Any]) -> None:
    llm: Any = SimpleNamespace(add_request=None, engine_core=SimpleNamespace(engine_ranks_managed=[0, 1]))
    request = {"token_ids": [5], **sections}
    with pytest.raises(InvalidRequestError, match=name):
        asyncio.run(engine()._submit(llm, job(request, SamplingParams()), PROMPT))


def test_what_vllm_says_of_itself() -> None:
    assert isinstance(submitted(VllmDeadError()), EngineDeadError)
    assert isinstance(submitted(QueueOverflowError()), WorkerUnavailable)


@pytest.mark.parametrize(("model", "highest", "limit"), [(100, 98, 100), (100, 119, 120), (100, None, 100)])
def test_the_vocabulary_is_what_vllm_takes(model: int, highest: int | None, limit: int) -> None:
    """The model may know more tokens than its tokenizer, and the other way round."""
    config: Any = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: model))
    tokenizer = None if highest is None else SimpleNamespace(max_token_id=highest)
    assert vocab_size(config, tokenizer) == limit


def test_a_request_that_vllm_gives_up_goes_to_another_worker_and_the_others_stay() -> None:
    """A frontend keeps an EngineShutdown against the whole worker for 5 s."""
    with pytest.raises(Disconnected, match="vLLM ended the request: error"):
        _finished({"token_ids": [], "finish_reason": "error"})
    assert _finished({"token_ids": [1], "finish_reason": "stop"})["finish_reason"] == "stop"


class Aborts:
    """vLLM with one request, as far as aborts are concerned."""

    def __init__(self, *, fetches: bool, begun: bool) -> None:
        self.aborted: list[str] = []
        self.errored = False
        self.ready = asyncio.Event()
        state = SimpleNamespace(is_prefilling=not begun, queue=SimpleNamespace(ready=self.ready))
        self.output_processor = SimpleNamespace(external_req_ids={"r": ["r-1"]}, request_states={"r-1": state})
        self.engine = engine()
        role, llm = SimpleNamespace(fetches=fetches), self
        self.engine._started = SimpleNamespace(role=role, llm=llm)  # type: ignore[assignment]

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.mark.parametrize(("fetches", "begun"), [(False, False), (True, True)], ids=["not divided", "begun"])
def test_an_abort_reaches_vllm_at_once(fetches: bool, begun: bool) -> None:
    async def main() -> None:
        vllm = Aborts(fetches=fetches, begun=begun)
        await vllm.engine.abort("r")
        await vllm.engine.abort("another")
        assert vllm.aborted == ["r", "another"]

    asyncio.run(main())


@pytest.mark.parametrize("dies", [False, True])
def test_an_abort_while_the_kv_cache_is_on_its_way_comes_later(dies: bool) -> None:
    async def main() -> None:
        vllm = Aborts(fetches=True, begun=False)
        await asyncio.wait_for(vllm.engine.abort("r"), 1)
        await asyncio.sleep(0.01)
        assert vllm.aborted == []
        vllm.errored = dies
        vllm.ready.set()
        await asyncio.gather(*vllm.engine._tasks)
        assert vllm.aborted == ([] if dies else ["r"])

    asyncio.run(main())
