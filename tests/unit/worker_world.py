"""A worker in a test: the launcher with everything around it replaced, and a record of what happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

from aio import settle, until
from dynamo.runtime import Context
from fakes import FakeDiscovery

from dynamo_worker.engine import EngineInfo
from dynamo_worker.host import startup
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.launcher import Launcher
from dynamo_worker.host.plugins.calling import HookOutcome
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, PluginRecord
from dynamo_worker.host.supervisor_channel import SupervisorChannel
from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.channel import Channel, pair
from dynamo_worker.supervisor.protocol import RUN_DIR

GRACEFUL = ["STARTING", "SERVING", "UNREGISTERING", "GRACE", "DRAINING", "CLEANUP", "STOPPED"]


FATAL = ["STARTING", "SERVING", "FATAL", "STOPPED"]


TOKENS = {"token_ids": [1]}


class Engine:
    """Answers every request with one chunk; a test changes what it needs to."""

    def __init__(self, world):
        self.world = world
        self.info = EngineInfo("toy", "/models/toy")
        self.pids = []
        self.aborted = []
        self.hold = None

    async def start(self, worker_id):
        self.world.note("engine started")
        return self.info

    async def generate(self, request, context):
        yield {"token_ids": [1]}
        if self.hold is not None and not context.id().startswith("canary"):
            await self.hold.wait()
        yield {"token_ids": [2], "finish_reason": "stop"}

    async def abort(self, request_id):
        self.aborted.append(request_id)

    def processes(self):
        return self.pids


class EngineWithCanary(Engine):
    def canary_request(self):
        return dict(TOKENS)


class FakeRuntime:
    """Discovery and endpoints as the launcher sees them."""

    status_port = None
    worker_id = 0x4EC5
    problem = None

    def __init__(self, world):
        self.world = world
        self.handlers = {}
        self.closed = asyncio.Event()
        self.serve_error = None
        self.unregister_seconds = 0.0
        self.withdrawn = True
        self.registered = []
        self.exposition = None
        self.discovery = FakeDiscovery()

    def endpoint(self, name):
        return f"endpoint {name}"

    def record_registration(self, run_dir):
        self.world.note("recorded")
        ledger.record_registration(run_dir, "mem", self.worker_id)

    def serve(self, spec, handler):
        self.world.note(f"served {spec.name}")
        self.handlers[spec.name] = handler

        async def serve():
            await self.closed.wait()
            if self.serve_error:
                raise self.serve_error

        return asyncio.ensure_future(serve())

    def completed(self, info):
        return info

    async def await_discovery(self):
        pass

    async def register(self, info, *, endpoint):
        self.world.note("registered")
        self.registered.append(endpoint)

    async def watch_registration(self, on_fatal):
        return None

    async def unregister(self):
        await asyncio.sleep(self.unregister_seconds)
        self.world.note("unregistered")
        return self.withdrawn

    def close_to_others(self, earlier_ports):
        self.world.note("closed to others")

    def set_ready(self, ready):
        self.world.note("ready" if ready else "not ready")

    def expose_metrics(self, exposition, *, endpoint):
        self.exposition = exposition

    async def shutdown(self, timeout):
        self.world.note("runtime shut down")
        self.closed.set()


class FakePlugins:
    """The hooks; ``hooks`` maps a name to an asynchronous function that replaces doing nothing."""

    engine = PluginRecord("toy", ENGINE_GROUP, "toy_plugin", version="1.0")

    def __init__(self, world):
        self.world = world
        self.configured = None
        self.hooks = {}
        self.fatal = []

    def configure(self, args, context):
        self.configured = args, context

    def create_engine(self, args, context):
        assert self.configured == (args, context)
        self.world.context = context
        if isinstance(self.world.engine, BaseException):
            raise self.world.engine
        self.world.note("engine created")
        return self.world.engine

    async def _call(self, hook):
        if hook != "check_health":
            self.world.note(hook)
        if hook in self.hooks:
            await self.hooks[hook]()
        return [HookOutcome(hook, "toy", 0.0)]

    async def on_ready(self, engine, info, timeout):
        return await self._call("on_ready")

    async def check_health(self, engine, timeout):
        return await self._call("check_health")

    async def drain(self, engine, deadline):
        return await self._call("drain")

    async def on_fatal_error(self, engine, error, deadline):
        self.fatal.append(error)
        return await self._call("on_fatal_error")

    async def cleanup(self, engine, deadline, limit):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._call("cleanup"), deadline.within(limit).remaining())


class World:
    """Everything around one launcher, and what happened in it."""

    def __init__(self, tmp_path, monkeypatch):
        self.happened = []
        self.run_dir = tmp_path
        self.monkeypatch = monkeypatch
        self.engine = EngineWithCanary(self)
        self.plugins = FakePlugins(self)
        self.supervised = True
        self.settings = {
            "grace_period": 0,
            "discovery_backend": "mem",
            "health_check_interval": 0.02,
            "stall_timeout": 0,
            "termination_grace_period": 30,
        }
        self.create_error = None
        self.code = None
        self.messages = []

    def note(self, what):
        self.happened.append(what)

    def order(self, *events):
        """Whether these happened, in this order."""
        rest = iter(self.happened)
        return all(event in rest for event in events)

    def run(self, scenario):
        """Let a worker live while ``scenario(world)`` does things to it; return the exit code."""
        asyncio.run(asyncio.wait_for(self._live(scenario), 30))
        return self.code

    async def _live(self, scenario):
        self.runtime = FakeRuntime(self)

        async def create(settings):
            if self.create_error:
                raise self.create_error
            self.runtime.settings = settings
            return self.runtime

        self.monkeypatch.setattr(startup.Runtime, "create", create)
        theirs, ours = pair()
        with ours:
            self.supervisor = Channel(theirs)
            if self.supervised:
                self.monkeypatch.setenv(RUN_DIR, str(self.run_dir))
                ours.setblocking(False)
            control = SupervisorChannel(ours if self.supervised else None)
            control.hand_over = lambda *_, **__: False  # nobody here would accept the connections
            self.launcher = Launcher(WorkerSettings(engine="toy", **self.settings), self.plugins, "args", control)
            life = asyncio.ensure_future(self.launcher.run())
            started = time.monotonic()
            try:
                await scenario(self)
                self.code = await life
            finally:
                life.cancel()
                self.took = time.monotonic() - started
                self.read()
                self.supervisor.close()
        await settle()

    def read(self):
        self.messages += self.supervisor.receive()
        return self.messages

    @property
    def states(self):
        """The states that the supervisor was told."""
        return [message["state"] for message in self.read() if message["type"] == "state"]

    @property
    def reason(self):
        return self.launcher.reason

    async def serving(self):
        await until(lambda: self.launcher._state.value == "SERVING")

    def stop(self, level=1, signal_name="SIGTERM"):
        at = time.monotonic()
        self.supervisor.send("stop", level=level, signal=signal_name, at=at)
        return at

    def request(self, request_id="r", endpoint="generate"):
        """Start one request, as the runtime does."""

        async def consume():
            handler = self.runtime.handlers[endpoint]
            return [chunk async for chunk in handler(dict(TOKENS), Context(id=request_id))]

        return asyncio.ensure_future(consume())

    async def busy(self):
        """Start a request that does not end by itself."""
        await self.serving()
        self.engine.hold = asyncio.Event()
        running = self.request()
        await until(lambda: len(self.launcher._requests) == 1)
        return running


async def stop_when_serving(world):
    await world.serving()
    world.stop()


class PanicException(BaseException):
    """Stands for ``pyo3_runtime.PanicException``, which is no Exception either and cannot be imported."""


#: What no ``except Exception`` catches.
NO_EXCEPTIONS = [PanicException, SystemExit, KeyboardInterrupt, asyncio.CancelledError]


def raising(error, *, later=False):
    """Return a function that raises, when it is called or when it is awaited."""

    def fail(*args, **kwargs):
        raise error

    async def fail_later(*args, **kwargs):
        raise error

    return fail_later if later else fail


async def nothing(world):
    pass


@contextlib.contextmanager
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def stop_itself(world):
    await world.serving()
    os.kill(os.getpid(), signal.SIGTERM)


async def ask(caplog, request):
    """Send a request to the status server and return the answer."""
    (record,) = [record for record in caplog.records if record.getMessage() == "Status server listening"]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(record.fields["url"].rpartition(":")[2]))
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    return answer
