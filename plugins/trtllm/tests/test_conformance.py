"""TensorRT-LLM keeps what every engine plugin has to keep."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import pytest

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import Engine, LocalContext
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.supervisor import linux
from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker.testing.trial import Trial
from dynamo_worker_trtllm.engine import TrtllmEngine


class TestTrtllm(EngineConformance):
    def test_create_starts_nothing(self, engine: Engine) -> None:
        """Open MPI's daemon is there if an earlier engine of this process needed it."""
        stats = [linux.read_stat(pid) for pid in engine.processes()]
        assert {stat.name for stat in stats if stat is not None} <= {"orted"}

    def test_an_engine_goes_on_after_a_standstill(self, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of its ranks. Those that are stopped and continued together with Open MPI's daemon stay silent (seen)."""
        _, *ranks = trial.engine.processes()
        monkeypatch.setattr(trial.engine, "processes", lambda: ranks)
        super().test_an_engine_goes_on_after_a_standstill(trial)

    def test_processes_are_gone_after_cleanup(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        """Except Open MPI's daemon, which belongs to this process and ends with it."""

        async def check() -> list[int]:
            async with self.started(subject, plugins, engine):
                return list(engine.processes())

        daemon, *ranks = asyncio.run(check())
        stats = [linux.read_stat(pid) for pid in ranks]
        assert ranks
        assert all(stat is None or stat.ended for stat in stats), stats
        stat = linux.read_stat(daemon)
        assert stat is not None
        assert (stat.name, stat.parent) == ("orted", os.getpid())

    def test_an_aborted_request_ends_within_a_step(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        self.check_an_abort_ends_within_a_step(subject, plugins, engine, 3000)

    @pytest.mark.parametrize("answers", [1, 3])
    def test_a_cancelled_request_leaves_the_engine(
        self, subject: Subject, plugins: Plugins, engine: Engine, answers: int
    ) -> None:
        async def check() -> None:
            assert isinstance(engine, TrtllmEngine)
            async with self.started(subject, plugins, engine):
                chunks: list[dict[str, Any]] = []
                request = self.request(engine, 3000)
                request["sampling_options"] = {"temperature": 1.0, "n": answers}
                answer = asyncio.ensure_future(engine.push(request, LocalContext("many"), chunks.append))
                while {chunk["index"] for chunk in chunks} != set(range(answers)):
                    await asyncio.sleep(0.001)
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
                await engine.abort("many")
                deadline = Deadline.after(5)
                while engine.started.load.requests():
                    assert not deadline.passed, "TensorRT-LLM still works for a client that is gone"
                    await asyncio.sleep(0.01)

        asyncio.run(check())

    def test_a_request_cancelled_while_it_is_handed_over_leaves_the_engine(
        self, subject: Subject, plugins: Plugins, engine: Engine
    ) -> None:
        async def check() -> None:
            assert isinstance(engine, TrtllmEngine)
            async with self.started(subject, plugins, engine):
                for number in range(20):
                    name = str(number)
                    push = engine.push(self.request(engine, 3000), LocalContext(name), lambda _: None)
                    answer = asyncio.ensure_future(push)
                    await asyncio.sleep(0)
                    answer.cancel()
                    await asyncio.wait({answer})
                    await engine.abort(name)
                chunks: list[Any] = []
                await engine.push(self.request(engine, 5), LocalContext("after"), chunks.append)
                deadline = Deadline.after(10)
                while engine.started.load.requests():
                    assert not deadline.passed, "TensorRT-LLM still works for clients that are gone"
                    await asyncio.sleep(0.01)

        asyncio.run(check())

    def test_one_bad_request_harms_no_other(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            assert isinstance(engine, TrtllmEngine)
            async with self.started(subject, plugins, engine):
                chunks: list[Any] = []
                good = asyncio.ensure_future(engine.push(self.request(engine, 500), LocalContext("a"), chunks.append))
                for number in range(5):
                    bad = self.request(engine, 5)
                    bad["token_ids"] = []
                    with pytest.raises(InvalidRequestError):
                        await engine.push(bad, LocalContext(f"bad-{number}"), lambda _: None)
                await good
                assert sum(len(chunk["token_ids"]) for chunk in chunks) == 500

        asyncio.run(check())

    def test_health_is_what_the_engine_says(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            assert isinstance(engine, TrtllmEngine)
            async with self.started(subject, plugins, engine):
                await engine.check_health()
                engine.started.llm._executor._fatal_error = RuntimeError("a rank has gone mad")
                with pytest.raises(EngineDeadError, match="a rank has gone mad"):
                    await engine.check_health()
                engine.mark_failed()

        asyncio.run(check())
