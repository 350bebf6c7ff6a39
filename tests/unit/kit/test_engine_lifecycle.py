"""The lifecycle methods that engines inherit, and the error for a failed start."""

from __future__ import annotations

import asyncio

from dynamo_worker import Deadline
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle, start_error


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
