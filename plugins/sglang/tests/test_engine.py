"""What SGLang is told about where a request belongs."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.engine import LocalContext
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.engine import SglangEngine


def routed(monkeypatch: pytest.MonkeyPatch, **routing: Any) -> dict[str, Any]:
    monkeypatch.setattr(arguments, "ranks", lambda _: 2)
    engine = SglangEngine(argparse.Namespace(), None)  # type: ignore[arg-type]
    engine._settings = {"schedule_low_priority_values_first": False, "enable_trace": False}
    return engine._routing({"routing": routing}, LocalContext("r"))


def test_ranks_and_priorities_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = routed(monkeypatch, dp_rank=1, prefill_dp_rank=3, priority=-2)
    assert (found["routed_dp_rank"], found["disagg_prefill_dp_rank"], found["priority"]) == (1, 3, -2)
    assert routed(monkeypatch)["routed_dp_rank"] is None


@pytest.mark.parametrize("name", ["dp_rank", "prefill_dp_rank", "priority"])
@pytest.mark.parametrize("wrong", ["1", [1], 0.5, True, 2**64])
def test_what_the_scheduler_could_not_decode_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match=rf"routing\.{name}"):
        routed(monkeypatch, **{name: wrong})
