"""What SGLang is told about where a request belongs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.engine import LocalContext
from dynamo_worker_sglang.engine import _routing


def routed(*, lowest_first: bool = False, **routing: Any) -> dict[str, Any]:
    settings = {"schedule_low_priority_values_first": lowest_first, "enable_trace": False}
    started: Any = SimpleNamespace(settings=settings, ranks=range(2))
    return _routing(started, {"routing": routing}, LocalContext("r"))


def test_ranks_and_priorities_are_passed_on() -> None:
    found = routed(dp_rank=1, prefill_dp_rank=3, priority=-2)
    assert (found["routed_dp_rank"], found["disagg_prefill_dp_rank"], found["priority"]) == (1, 3, -2)
    assert (routed()["routed_dp_rank"], routed()["priority"]) == (None, None)
    assert routed(lowest_first=True, priority=-2)["priority"] == 2


@pytest.mark.parametrize("name", ["dp_rank", "prefill_dp_rank", "priority"])
@pytest.mark.parametrize("wrong", ["1", [1], 0.5, True, 2**64])
def test_what_the_scheduler_could_not_decode_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match=rf"routing\.{name}"):
        routed(**{name: wrong})
