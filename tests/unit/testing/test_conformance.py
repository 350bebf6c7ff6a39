"""The conformance kit fails the engines that deserve it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dynamo_worker.engine import EngineInfo
from dynamo_worker.host.plugins.calling import HookOutcome
from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker.testing.trial import Finding, Trial


class Engine:
    """Conforms; each test breaks one promise of it."""

    def __init__(self):
        self.pids = []

    async def start(self, worker_id):
        return EngineInfo("toy", None)

    async def generate(self, request, context):
        count = request["stop_conditions"]["max_tokens"]
        for number in range(count):
            await asyncio.sleep(0)
            yield {"token_ids": [number], **({"finish_reason": "length"} if number == count - 1 else {})}

    async def abort(self, request_id):
        pass

    def processes(self):
        return self.pids

    def canary_request(self):
        return {"token_ids": [1], "stop_conditions": {"max_tokens": 1}}


class Plugins:
    """The hooks of the toy engine; ``errors`` are raised by the hook of that name."""

    def __init__(self, waivers=None, **errors):
        self.errors = errors
        self.calls = []
        self.engine_plugin = SimpleNamespace(**({} if waivers is None else {"conformance_waivers": waivers}))

    def _outcomes(self, hook):
        self.calls.append(hook)
        return [HookOutcome(hook, "toy", 0.0, self.errors.get(hook))]

    async def cleanup(self, engine, deadline):
        return self._outcomes("cleanup")

    async def drain(self, engine, deadline):
        return self._outcomes("drain")

    async def check_health(self, engine, timeout):
        return self._outcomes("check_health")


KIT = EngineConformance()
#: The tests of the class itself; those of its bases are tried on the buggy engine (tests/conformance).
TESTS = [name for name in vars(EngineConformance) if name.startswith("test_")]


def run(name, engine, plugins=None, start_seconds=60.0):
    test = getattr(KIT, name)
    parameters = test.__code__.co_varnames[1 : test.__code__.co_argcount]
    subject = Subject("toy", start_seconds=start_seconds)
    available = {"subject": subject, "engine": engine, "plugins": plugins or Plugins()}
    if "trial" not in parameters:
        test(**{parameter: available[parameter] for parameter in parameters})
        return
    trial = Trial(subject, available["plugins"], engine)
    try:
        trial.start()
        test(trial)
    finally:
        trial.close()


@pytest.mark.parametrize("name", TESTS)
def test_a_good_engine_passes(name):
    run(name, Engine())


def test_starting_something_on_creation():
    engine = Engine()
    engine.pids = [1]
    with pytest.raises(AssertionError):
        run("test_create_starts_nothing", engine)


@pytest.mark.parametrize("name", ["test_cleanup_of_an_engine_that_never_started", "test_drain_and_cleanup_twice"])
def test_a_cleanup_that_fails(name):
    with pytest.raises(AssertionError, match="RuntimeError"):
        run(name, Engine(), Plugins(cleanup=RuntimeError("twice")))


def test_a_drain_that_fails():
    with pytest.raises(AssertionError, match="RuntimeError"):
        run("test_drain_and_cleanup_twice", Engine(), Plugins(drain=RuntimeError("twice")))


def test_an_unhealthy_start():
    with pytest.raises(AssertionError, match="RuntimeError"):
        run("test_healthy_while_it_runs", Engine(), Plugins(check_health=RuntimeError("sick")))


def test_no_health_check():
    plugins = Plugins()

    async def nobody(engine, timeout):
        return []

    plugins.check_health = nobody
    with pytest.raises(AssertionError, match="no check_health"):
        run("test_healthy_while_it_runs", Engine(), plugins)


def test_no_canary():
    class Without:
        pass

    with pytest.raises(AssertionError, match="canary_request"):
        run("test_it_has_a_canary", Without())


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [{"token_ids": [1, 2, 3, 4], "finish_reason": "length"}],
        [{"token_ids": [1, 2, 3, 4, 5, 6], "finish_reason": "length"}],
        [{"token_ids": [1, 2, 3, 4, 5]}],
        [{"token_ids": [1, 2, 3, 4, 5], "finish_reason": "stop"}],
        [{"token_ids": [1, 2, 3, 4], "finish_reason": "length"}, {"token_ids": [5], "finish_reason": "length"}],
    ],
    ids=["nothing", "too few", "too many", "no reason", "wrong reason", "two reasons"],
)
def test_a_wrong_stream(chunks):
    class Wrong(Engine):
        async def generate(self, request, context):
            for chunk in chunks:
                yield chunk

    with pytest.raises(AssertionError):
        run("test_generate", Wrong())


def test_an_engine_that_a_cancelled_request_breaks():
    class Fragile(Engine):
        broken = False

        async def generate(self, request, context):
            if self.broken:
                yield {"token_ids": []}
                return
            try:
                async for chunk in super().generate(request, context):
                    await asyncio.sleep(0.001)
                    yield chunk
            except asyncio.CancelledError:
                self.broken = True
                raise

    with pytest.raises(AssertionError):
        run("test_a_cancelled_request_leaves_the_engine_well", Fragile())


def test_an_abort_of_an_unknown_request_that_fails():
    class Strict(Engine):
        async def abort(self, request_id):
            if request_id != "long":
                raise KeyError(request_id)

    with pytest.raises(Finding, match="KeyError"):
        run("test_a_cancelled_request_leaves_the_engine_well", Strict())


def test_a_process_that_survives():
    engine = Engine()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        engine.pids = [process.pid]
        with pytest.raises(AssertionError, match=f"process {process.pid} survived"):
            run("test_processes_are_gone_after_cleanup", engine)
        process.kill()


def test_a_dead_process_that_nobody_has_reaped_yet_is_gone():
    engine = Engine()
    with subprocess.Popen([sys.executable, "-c", "print('up', flush=True)"], stdout=subprocess.PIPE) as process:
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        engine.pids = [process.pid]
        run("test_processes_are_gone_after_cleanup", engine)


def test_a_start_that_takes_too_long():
    class Slow(Engine):
        async def start(self, worker_id):
            await asyncio.sleep(60)

    plugins = Plugins()
    with pytest.raises(asyncio.TimeoutError):
        run("test_generate", Slow(), plugins, start_seconds=0.05)
    assert plugins.calls == ["cleanup"], "what has half started is cleaned up"


@pytest.mark.parametrize(
    ("waivers", "found"), [({"no_such_check": "why"}, "no check"), ({"generate": " "}, "no reason for 'generate'")]
)
def test_a_waiver_that_waives_nothing(waivers, found):
    with pytest.raises(Finding, match=found):
        run("test_waivers_are_of_checks", Engine(), Plugins(waivers))


def test_a_waiver_with_its_reason():
    run("test_waivers_are_of_checks", Engine(), Plugins({"generate": "its library cannot"}))
