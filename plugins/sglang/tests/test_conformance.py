"""SGLang keeps what every engine plugin has to keep."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import Engine, LocalContext
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker_sglang.engine import SglangEngine


class TestSglang(EngineConformance):
    def test_an_aborted_request_ends_within_a_step(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        self.check_an_abort_ends_within_a_step(subject, plugins, engine)

    def test_all_answers_to_a_cancelled_request_leave_the_engine(
        self, subject: Subject, plugins: Plugins, engine: Engine
    ) -> None:
        async def check() -> None:
            assert isinstance(engine, SglangEngine)
            async with self.started(subject, plugins, engine):
                chunks: list[dict[str, Any]] = []
                request = self.request(engine, 10_000)
                request["sampling_options"] = {"temperature": 1.0, "n": 3}
                answer = asyncio.ensure_future(engine.push(request, LocalContext("many"), chunks.append))
                while {chunk["index"] for chunk in chunks} != {0, 1, 2}:
                    await asyncio.sleep(0.001)
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
                await engine.abort("many")
                manager = engine.started.manager
                deadline = Deadline.after(2)
                while sum(load.num_running_reqs for load in manager.load_snapshot_reader.read_all()):
                    assert not deadline.passed, "SGLang still works for a client that is gone"
                    await asyncio.sleep(0.01)

        asyncio.run(check())
