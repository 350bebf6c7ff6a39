"""What every engine plugin has to keep: the checks a plugin's author runs first.

Each check is one test whose name says what it expects. A failure says what the engine did, where in its code, and why
it matters in production. Most checks share one engine, which is started once per class.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import Engine, EngineContext, EngineInfo, HasCanary, LocalContext, PushesChunks, Request
from dynamo_worker.errors import EngineDeadError
from dynamo_worker.supervisor import linux
from dynamo_worker.testing.checks.canary import CanaryChecks
from dynamo_worker.testing.checks.cancellation import CancellationChecks
from dynamo_worker.testing.checks.chunks import ChunkChecks
from dynamo_worker.testing.checks.command_line import CommandLineChecks
from dynamo_worker.testing.checks.concurrency import ConcurrencyChecks
from dynamo_worker.testing.checks.crash import CrashChecks
from dynamo_worker.testing.checks.description import DescriptionChecks
from dynamo_worker.testing.checks.embeddings import EmbeddingChecks
from dynamo_worker.testing.checks.errors import ErrorChecks
from dynamo_worker.testing.checks.event_loop import EventLoopChecks
from dynamo_worker.testing.checks.fields import FieldChecks
from dynamo_worker.testing.checks.health import HealthChecks
from dynamo_worker.testing.checks.lengths import LengthChecks
from dynamo_worker.testing.checks.lifecycle import CreationChecks, LeftoverChecks, StopChecks
from dynamo_worker.testing.checks.log_probabilities import LogProbabilityChecks
from dynamo_worker.testing.checks.metrics import MetricsChecks
from dynamo_worker.testing.checks.progress import ProgressChecks
from dynamo_worker.testing.checks.standstill import StandstillChecks
from dynamo_worker.testing.checks.text import TextChecks
from dynamo_worker.testing.checks.usage import UsageChecks
from dynamo_worker.testing.dialects import dialect_of, skip_others
from dynamo_worker.testing.suite_engines import SuiteEngines
from dynamo_worker.testing.trial import load_plugins

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from dynamo_worker.host.plugins.facade import Plugins
    from dynamo_worker.testing.crash import Crash
    from dynamo_worker.testing.lifecycle import Lifecycle
    from dynamo_worker.testing.subject import Subject
    from dynamo_worker.testing.trial import Trial

_ENGINES = pytest.StashKey[SuiteEngines]()


class EngineConformance(
    # pytest runs the last one first: those that use an engine up come at the end.
    CrashChecks,
    StopChecks,
    LeftoverChecks,
    CreationChecks,
    StandstillChecks,
    EventLoopChecks,
    CancellationChecks,
    ErrorChecks,
    ConcurrencyChecks,
    ProgressChecks,
    HealthChecks,
    MetricsChecks,
    EmbeddingChecks,
    TextChecks,
    FieldChecks,
    LogProbabilityChecks,
    UsageChecks,
    LengthChecks,
    ChunkChecks,
    CanaryChecks,
    DescriptionChecks,
    CommandLineChecks,
):
    """The checks of one engine: that of the fixture ``subject``. Derive from it in a test module."""

    @pytest.fixture(autouse=True)
    def _waived(self, request: pytest.FixtureRequest, subject: Subject) -> None:
        """Expect findings of the checks that the engine's plugin waives, and show its reason."""
        reason = waivers(load_plugins(subject.engine)).get(request.function.__name__.removeprefix("test_"))
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=f"waived: {reason}", raises=AssertionError, strict=False))

    def test_waivers_are_of_checks(self, trial: Trial) -> None:
        """A waiver of a check that does not exist, or without a reason, hides what nobody has looked at."""
        for name, reason in waivers(trial.plugins).items():
            known = callable(getattr(self, f"test_{name}", None))
            trial.expect(known, f"conformance_waivers names {name!r}, which is no check")
            trial.expect(isinstance(reason, str) and reason.strip(), f"conformance_waivers has no reason for {name!r}")

    @pytest.fixture
    def engines(self, request: pytest.FixtureRequest) -> SuiteEngines:
        """Return the engines of this class; the shared one is ended with the class."""
        node = request.node.getparent(pytest.Class)
        if _ENGINES not in node.stash:
            node.stash[_ENGINES] = engines = SuiteEngines()
            node.addfinalizer(engines.close)
        found: SuiteEngines = node.stash[_ENGINES]
        return found

    @pytest.fixture
    def trial(self, request: pytest.FixtureRequest, subject: Subject, engines: SuiteEngines) -> Trial:
        """Return the started engine that all checks of this class share."""
        trial = engines.shared(subject)
        trial.why = _why(request)
        skip_others(request.function, trial.dialect)
        return trial

    @pytest.fixture
    def fresh(self, request: pytest.FixtureRequest, subject: Subject, engines: SuiteEngines) -> Callable[[], Trial]:
        """Return a function that creates an engine for this check alone, which has to close it."""

        def make() -> Trial:
            trial = engines.fresh(subject)
            trial.why = _why(request)
            return trial

        return make

    @pytest.fixture
    def start_seconds(self, subject: Subject, engines: SuiteEngines) -> float:
        """Return how long the engine takes to start."""
        if not engines.start_seconds:
            engines.shared(subject)
        return engines.start_seconds

    @pytest.fixture
    def lifecycle(self, request: pytest.FixtureRequest, subject: Subject, engines: SuiteEngines) -> Lifecycle:
        """Return the record of one life of the engine, made once for the class."""
        lifecycle = engines.lifecycle(subject)
        lifecycle.trial.why = _why(request)
        return lifecycle

    @pytest.fixture
    def crash(self, request: pytest.FixtureRequest, subject: Subject, engines: SuiteEngines) -> Crash:
        """Return the record of the death of one of the engine's processes, made once for the class."""
        if not list(engines.shared(subject).engine.processes()):
            pytest.skip("the engine has no processes")
        crash = engines.crash(subject)
        crash.trial.why = _why(request)
        return crash

    @pytest.fixture
    def plugins(self, subject: Subject) -> Plugins:
        """Return the plugin, loaded and validated as the worker does it."""
        return load_plugins(subject.engine)

    @pytest.fixture
    def engine(self, subject: Subject, plugins: Plugins, tmp_path: Path, engines: SuiteEngines) -> Engine:
        """Return an engine that is created but not started; no other engine runs."""
        engines.close()
        parser = argparse.ArgumentParser(allow_abbrev=False)
        plugins.add_arguments(parser)
        context = EngineContext(component="test.backend", private_dir=tmp_path, supervised=False)
        return plugins.create_engine(parser.parse_args(list(subject.flags)), context)

    @contextlib.asynccontextmanager
    async def started(self, subject: Subject, plugins: Plugins, engine: Engine) -> AsyncIterator[EngineInfo]:
        """Run the engine for the length of a ``with`` block."""
        try:
            yield await asyncio.wait_for(engine.start(1), subject.start_seconds)
        finally:
            outcomes = await plugins.cleanup(engine, Deadline.after(30))
            assert all(outcome.ok for outcome in outcomes), outcomes

    def request(self, engine: Engine, tokens: int) -> Request:
        """Return a request for so many tokens, made from the engine's own canary."""
        assert isinstance(engine, HasCanary)
        canary = engine.canary_request()
        request: Request = dialect_of(canary).request(canary, tokens, 0, None, {})  # type: ignore[assignment]
        return request

    def check_an_abort_ends_within_a_step(
        self, subject: Subject, plugins: Plugins, engine: Engine, tokens: int = 10_000
    ) -> None:
        """Check that an engine that pushes its chunks ends an aborted request with its next step.

        :param tokens: ``max_tokens`` of the request, which must still run when it is aborted.
        """

        async def check() -> None:
            assert isinstance(engine, PushesChunks)
            async with self.started(subject, plugins, engine):
                chunks: list[Any] = []
                request = self.request(engine, tokens)
                answer = asyncio.ensure_future(engine.push(request, LocalContext("long"), chunks.append))
                while len(chunks) < 20:
                    await asyncio.sleep(0.001)
                before = len(chunks)
                await engine.abort("long")
                await asyncio.wait_for(answer, 10)
                assert chunks[-1]["finish_reason"] == "cancelled"
                # What was on its way, the step that had begun, and the end.
                assert len(chunks) - before <= 3

        asyncio.run(check())

    def test_generate(self, trial: Trial) -> None:
        """The plainest request there is: an engine that fails it serves nobody."""
        assert trial.info is not None
        trial.expect(trial.info.model_name, "EngineInfo.model_name is empty", trial.engine.start)
        answer = trial.answer(5, prompt=0)
        made = answer.made
        trial.expect(made == 5, f"max_tokens is 5; the answer has {made} tokens", trial.engine.generate)
        trial.expect(answer.reasons == ["length"], f"finish reasons: {answer.reasons}", trial.engine.generate)
        last = trial.dialect.reason(answer.parts[-1]) if answer.parts else None
        trial.expect(last == "length", f"the last chunk has {last!r}", trial.engine.generate)

    def test_healthy_while_it_runs(self, trial: Trial) -> None:
        """The worker ends an engine whose health check fails."""
        outcomes = trial.run(trial.plugins.check_health(trial.engine, timeout=10))
        trial.expect(outcomes, "the engine's plugin implements no check_health")
        for outcome in outcomes:
            trial.expect(outcome.ok, f"check_health: {outcome.error!r}", getattr(trial.engine, "check_health", None))

    def test_a_cancelled_request_leaves_the_engine_well(self, trial: Trial) -> None:
        """A client that disconnects must cost the others nothing."""

        async def check() -> bool:
            stream = trial.engine.generate(trial.request(10_000), LocalContext("long"))

            async def consume() -> None:
                async for _ in stream:
                    pass

            task = asyncio.ensure_future(consume())
            await asyncio.sleep(0.2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineDeadError):
                await task
            await trial.engine.abort("long")
            await trial.engine.abort("a request nobody made")
            chunks = [c async for c in trial.engine.generate(trial.request(1), LocalContext("next"))]
            return any(trial.dialect.reason(chunk) for chunk in chunks)

        trial.expect(trial.run(check()), "the next request was not answered", trial.engine.generate)

    def test_it_has_a_canary(self, engine: Engine) -> None:
        """Warm-up and stall detection need it."""
        assert isinstance(engine, HasCanary), "warm-up and stall detection need canary_request()"

    def test_create_starts_nothing(self, engine: Engine) -> None:
        """What is created before the start outlives a start that fails."""
        assert list(engine.processes()) == []

    def test_cleanup_of_an_engine_that_never_started(self, plugins: Plugins, engine: Engine) -> None:
        """A worker is stopped before the start too."""

        async def check() -> None:
            outcomes = await plugins.cleanup(engine, Deadline.after(10))
            assert all(outcome.ok for outcome in outcomes), outcomes

        asyncio.run(check())

    def test_drain_and_cleanup_twice(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        """An operator drains a worker before it is stopped, and a failed start cleans up twice."""

        async def check() -> None:
            async with self.started(subject, plugins, engine):
                for _ in range(2):
                    outcomes = await plugins.drain(engine, Deadline.after(10))
                    assert all(outcome.ok for outcome in outcomes), outcomes
                outcomes = await plugins.cleanup(engine, Deadline.after(30))
                assert all(outcome.ok for outcome in outcomes), outcomes

        asyncio.run(check())

    def test_processes_are_gone_after_cleanup(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        """A process that is left keeps the GPU's memory."""

        async def check() -> list[int]:
            async with self.started(subject, plugins, engine):
                return list(engine.processes())

        for pid in asyncio.run(check()):
            stat = linux.read_stat(pid)
            # A dead one may still wait to be reaped by its parent.
            assert stat is None or stat.ended, f"process {pid} survived cleanup"


def waivers(plugins: Plugins) -> Mapping[str, str]:
    """Return the checks that an engine's plugin waives, by name, with the reasons."""
    found: Mapping[str, str] = getattr(plugins.engine_plugin, "conformance_waivers", {})
    return found


def _why(request: pytest.FixtureRequest) -> str:
    """Return why a check matters: its docstring."""
    return " ".join((inspect.getdoc(request.function) or "").split())
