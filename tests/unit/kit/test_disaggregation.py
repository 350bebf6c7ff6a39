"""What prefill and decode workers are to routers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.canary import MARK
from dynamo_worker.kit.disaggregation import Role


@pytest.mark.parametrize(
    ("mode", "needs", "types"),
    [
        ("aggregated", (), ("chat", "completions")),
        ("prefill", (("decode",),), ("prefill",)),
        ("decode", (("prefill",),), ("chat", "completions")),
    ],
)
def test_roles(mode, needs, types):
    role = Role(mode)
    assert (role.mode, role.needs, role.endpoint_types) == (mode, needs, types)


@pytest.mark.parametrize(
    ("annotations", "bypasses"),
    [
        (None, False),
        ([], False),
        (["other"], False),
        (["other", "bypass-remote-prefill"], True),
        (["x-bypass-remote-prefill"], True),
        ([["x-bypass-remote-prefill"], {}, "x-bypass-remote-prefill"], True),
        ([[1], {"a": 1}, None], False),
        ("x-bypass-remote-prefill", False),
        (3, False),
    ],
)
def test_a_decode_worker_may_have_to_prefill(annotations, bypasses):
    assert Role("decode").bypasses_prefill({"annotations": annotations}) is bypasses
    assert not Role("decode").bypasses_prefill({})


class Noting(Role):
    """Notes what a request is prepared for."""

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.prepared: list[Any] = []

    def prepare_prefill(self, translated: Any) -> None:
        self.prepared.append("prefill")

    def prepare_decode(self, translated: Any, handed_over: Mapping[str, Any]) -> None:
        self.prepared.append(dict(handed_over))


ONE = SimpleNamespace(n=1)
HANDED_OVER = {"prefill_result": {"disaggregated_params": {"room": 1}}}


@pytest.mark.parametrize(
    ("mode", "request_", "prepared"),
    [
        ("aggregated", HANDED_OVER, []),
        ("prefill", {}, ["prefill"]),
        ("prefill", {MARK: True}, []),
        ("decode", HANDED_OVER, [{"room": 1}]),
        ("decode", {}, [{}]),
        ("decode", {MARK: True}, []),
        ("decode", {"annotations": ["bypass-remote-prefill"]}, []),
    ],
)
def test_a_request_is_prepared_for_the_workers_phase(mode: str, request_: Any, prepared: list[Any]) -> None:
    role = Noting(mode)
    role.prepare(request_, ONE)
    assert role.prepared == prepared
    Role(mode).prepare(request_, ONE)  # an engine may have nothing to do


def test_a_prefill_makes_one_answer() -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling_options\.n: a prefill worker makes only one answer"):
        Noting("prefill").prepare({}, SimpleNamespace(n=2))


USAGE = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 9}}


def reported(mode: str, request: dict[str, Any]) -> Any:
    """Return the details that a client reads of a request all of whose prompt the engine counts as cached."""
    chunks: list[Any] = []
    send = Role(mode).with_prefill_usage(request, chunks.append)
    send({"token_ids": [1], "index": 0})
    send({"token_ids": [2], "index": 0, "finish_reason": "stop", "completion_usage": dict(USAGE)})  # type: ignore[arg-type]
    assert chunks[0] == {"token_ids": [1], "index": 0}
    assert {**chunks[1]["completion_usage"], "prompt_tokens_details": None} == {**USAGE, "prompt_tokens_details": None}
    return chunks[1]["completion_usage"]["prompt_tokens_details"]


@pytest.mark.parametrize(
    ("details", "expected"),
    [({"cached_tokens": 4}, {"cached_tokens": 4}), ({"cached_tokens": 0}, None), ({}, None), (None, None)],
    ids=str,
)
def test_what_was_cached_is_the_prefill_workers_to_say(details: Any, expected: Any) -> None:
    request = {"prefill_result": {**HANDED_OVER["prefill_result"], "prompt_tokens_details": details}}
    assert reported("decode", request) == expected
    # Here the engine's own count is right.
    for own in ({}, {"annotations": ["bypass-remote-prefill"], **request}, {MARK: True, **request}):
        assert reported("decode", own) == USAGE["prompt_tokens_details"]
    assert reported("aggregated", request) == USAGE["prompt_tokens_details"]


@pytest.mark.parametrize("cached", [-1, "4", 2**40, [4]], ids=str)
def test_a_count_that_is_none_is_refused_by_name(cached: Any) -> None:
    request = {"prefill_result": {"disaggregated_params": {}, "prompt_tokens_details": {"cached_tokens": cached}}}
    with pytest.raises(InvalidRequestError, match=r"prompt_tokens_details\.cached_tokens: expected"):
        Role("decode").with_prefill_usage(request, lambda _: None)
