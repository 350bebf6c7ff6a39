"""The lifecycle methods that engines inherit, and the error for a failed start."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dynamo_worker import Deadline
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, shut_down, start_error


def test_an_engine_needs_no_lifecycle_method() -> None:
    async def main() -> None:
        engine, deadline = EngineLifecycle(), Deadline.after(1)
        await engine.on_ready()
        await engine.check_health()
        await engine.drain(deadline)
        engine.mark_failed()
        await engine.shutdown(deadline)
        await engine.shutdown(deadline)
        assert not deadline.passed

    asyncio.run(main())


def test_a_failed_start_names_the_engine_and_points_to_its_output() -> None:
    error = start_error("vLLM", ValueError("no memory"))
    assert str(error).startswith("vLLM failed to start: no memory")
    assert error.hint == "see the engine's log output above"


def test_an_engines_own_shutdown_has_a_limit_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    release = threading.Event()
    asyncio.run(shut_down("Toy", lambda: done.append(1), 5))
    assert done == [1]
    assert not caplog.records
    with caplog.at_level("INFO"):
        asyncio.run(shut_down("Toy", lambda: release.wait(10), 0.05))
        release.set()
        asyncio.run(shut_down("Toy", lambda: 1 // 0, 5))
    assert "own shutdown takes too long" in caplog.text
    assert "own shutdown failed" in caplog.text
