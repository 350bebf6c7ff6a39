"""A small Dynamo cluster on one machine: private discovery, a frontend, workers, and what tests do to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker.testing.client import Load, Result, chat
from dynamo_worker.testing.leftovers import MARKER
from dynamo_worker.testing.sockets import Listener, listening
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Variables that would let a test talk to anything but itself.
_FOREIGN = ("DYN_", "DYNAMO_", "ETCD_", "NATS_", "OTEL_", "NOTIFY_SOCKET")


#: Variables that say where workers and frontends listen.
_HOSTS = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")

#: Ports that have been given away: whoever got one may not listen yet.
_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface, below the range of outgoing connections.

    None is returned twice.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        with socket.socket() as probe:
            candidate = 10_000 + port % 20_000
            if candidate in _given:
                continue
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                _given.add(candidate)
                return candidate


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Post a JSON object; return status and answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - our own servers
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class Worker:
    """One ``dynamo-worker`` process and everything below it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, cluster: Cluster, status_port: int) -> None:
        self._process = process
        self._log = log
        self._cluster = cluster
        self.started_at = time.monotonic()
        #: Port of ``/live``, ``/health`` and ``/metrics``.
        self.status_port = status_port
        #: Instance id in discovery, known once it is ready.
        self.instance = ""

    @property
    def pid(self) -> int:
        """The process that was started: the supervisor, unless ``--no-supervise`` was given."""
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything it has written so far."""
        return self._log.read_text(errors="replace")

    @property
    def worker_pid(self) -> int:
        """The worker process proper: the one that says it starts."""
        match = re.search(r"Starting worker .*pid=(\d+)", self.log)
        assert match, f"no worker process yet:\n{self.log}"
        return int(match[1])

    @property
    def run_dir(self) -> Path:
        """Its private directory, which its supervisor removes."""
        return Path(self.wait_log(r"Worker started .*run_dir=(\S+)")[1])

    @property
    def guardian_pid(self) -> int:
        """The process between supervisor and worker."""
        with open(f"/proc/{self.worker_pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[1])

    def wait_log(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """Wait for a line in the log.

        :raises AssertionError: it does not come, or the process ends first.
        """

        def search() -> re.Match[str] | None:
            # Look whether it runs first, then read: the last line must not be missed.
            gone = self._process.poll() is not None
            match = re.search(pattern, self.log)
            assert match or not gone, f"ended with {self._process.returncode} before {pattern!r}:\n{self.log}"
            return match

        found = eventually(search, timeout, f"{pattern!r} in the log of pid {self.pid}")
        assert found is not None
        return found

    def wait_ready(self, timeout: float | None = None) -> Worker:
        """Wait until the worker serves, as long as the cluster allows for a start unless ``timeout`` is given."""
        seconds = self._cluster.start_seconds if timeout is None else timeout
        self.instance = self.wait_log(r"Worker ready .*instance=([0-9a-f]+)", seconds)[1]
        return self

    def wait_gone(self, timeout: float = 40.0) -> int:
        """Wait for the end and return the exit code, 128 + n for a death by signal n.

        :raises AssertionError: it still runs.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.log[-4000:]}") from None
        return code if code >= 0 else 128 - code

    @property
    def running(self) -> bool:
        """Whether the started process still runs."""
        return self._process.poll() is None

    @property
    def registered(self) -> bool:
        """Whether it is in discovery."""
        return any(self.instance in path.name for path in self._cluster.discovery.rglob("*"))

    def stop(self) -> None:
        """Ask it to end, and wait until it has.

        :raises AssertionError: it did not end well.
        """
        self.signal(signal.SIGTERM)
        code = self.wait_gone()
        assert code == 0, f"exit code {code}:\n{self.log[-4000:]}"

    def signal(self, number: signal.Signals, pid: int | None = None) -> float:
        """Send a signal to the started process or to another one; return the moment it was sent."""
        now = time.monotonic()
        os.kill(pid or self.pid, number)
        return now

    def status(self, path: str) -> tuple[int, str]:
        """Ask the status server; status 0 if nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def operate(self, name: str, body: dict[str, Any] | None = None) -> Any:
        """Call the control route ``/engine/NAME`` and return its answer."""
        return post(f"http://127.0.0.1:{self.status_port}/engine/{name}", body or {})[1]

    def metric(self, name: str) -> float:
        """Return the sum of all samples of one metric on ``/metrics``, 0 if there are none."""
        samples = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", self.status("/metrics")[1], re.MULTILINE)
        return sum(map(float, samples))

    def children(self) -> dict[int, str]:
        """Return all processes below the started one: pid and command line."""
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                    parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(entry))
        found: dict[int, str] = {}
        waiting = [self.pid]
        while waiting:
            for child in parents.get(waiting.pop(), ()):
                with contextlib.suppress(OSError), open(f"/proc/{child}/cmdline", "rb") as file:
                    found[child] = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
                waiting.append(child)
        return found

    def listening(self) -> list[Listener]:
        """Return the TCP sockets that it and all processes below it listen on."""
        return listening([self.pid, *self.children()])

    def child(self, pattern: str) -> int:
        """Return the pid of the one process below whose command line matches.

        :raises AssertionError: there is none, or more than one.
        """
        children = self.children()
        found = [pid for pid, command in children.items() if re.search(pattern, command)]
        assert len(found) == 1, f"{pattern!r} matches {found} of {children}"
        return found[0]


class Cluster:
    """Workers, a frontend and the directory in which they find each other."""

    def __init__(self, directory: Path, tmp: Path, marker: str, *, engine_args: Sequence[str] = ()) -> None:
        """Make a cluster without any process.

        :param directory: for discovery and logs.
        :param tmp: ``TMPDIR`` of all processes.
        :param marker: value of the variable that marks all processes.
        :param engine_args: arguments of every worker, ``--engine NAME`` first.
        """
        self.discovery = directory / "discovery"
        self.discovery.mkdir(0o700)
        self.tmp = tmp
        self.engine_args = list(engine_args) or ["--engine", "echo"]
        #: Name under which clients ask for the model.
        self.model = "echo"
        #: Seconds a worker may take until it serves.
        self.start_seconds = 60.0
        #: The frontend, once there is one.
        self.url = ""
        self._directory = directory
        self._marker = marker
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Return an environment in which everything stays on the loopback interface and in this cluster."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment |= {
            MARKER: self._marker,
            "TMPDIR": str(self.tmp),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.discovery),
            **dict.fromkeys(_HOSTS, "127.0.0.1"),
            "PYTHONUNBUFFERED": "1",
        }
        for name, value in changes.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        return environment

    def run(
        self, *arguments: str, timeout: float = 60.0, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``dynamo-worker`` with these arguments to its end."""
        return subprocess.run(
            [sys.executable, "-m", "dynamo_worker", *arguments],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start_worker(self, *arguments: str, prefix: Sequence[str] = (), **environment: str | None) -> Worker:
        """Start a worker without waiting for it.

        :param prefix: a command in front of the worker's that becomes it, as one that sets limits does.
        """
        status_port = free_port()
        number = len(self._processes)
        log = self._directory / f"worker-{number}.log"
        command = [sys.executable, "-m", "dynamo_worker", *self.engine_args, "--system-port", str(status_port)]
        process = self._start([*prefix, *command, *arguments], log, environment)
        return Worker(process, log, self, status_port)

    def worker(self, *arguments: str, prefix: Sequence[str] = (), **environment: str | None) -> Worker:
        """Start a worker and wait until it serves."""
        return self.start_worker(*arguments, prefix=prefix, **environment).wait_ready()

    def worker_with_frontend(self, *arguments: str, host: str = "127.0.0.1", **environment: str | None) -> Worker:
        """Start a worker that decides by itself where it listens, and wait until it and its frontend serve.

        :param host: of the frontend.
        """
        port = free_port()
        hosts: dict[str, Any] = dict.fromkeys(_HOSTS)
        worker = self.worker("--frontend", f"{host}:{port}", *arguments, **{**hosts, **environment})
        self.url = f"http://{host}:{port}"
        return worker

    def serve(self, count: int, *arguments: str, frontend: Sequence[str] = ()) -> list[Worker]:
        """Start workers, all at once, and a frontend if there is none yet; wait until it offers the model.

        :param count: how many workers.
        :param arguments: of every worker.
        :param frontend: arguments of the frontend.
        """
        if not self.url:
            self.start_frontend(*frontend)
        workers = [self.start_worker(*arguments) for _ in range(count)]
        for worker in workers:
            worker.wait_ready()
        self.wait_model()
        return workers

    def start_frontend(self, *arguments: str, **environment: str | None) -> str:
        """Start a frontend that migrates requests, and return its URL."""
        port = free_port()
        log = self._directory / f"frontend-{len(self._processes)}.log"
        command = [sys.executable, "-m", "dynamo_worker", "frontend", "--http", f"127.0.0.1:{port}", *arguments]
        self._start(command, log, {"DYN_LOG": "warn", **environment})
        self.url = f"http://127.0.0.1:{port}"
        eventually(lambda: self._get("/health") is not None, 30, f"the frontend: {log.read_text(errors='replace')}")
        return self.url

    def _start(self, command: list[str], log: Path, environment: dict[str, Any]) -> subprocess.Popen[bytes]:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:  # noqa: S310 - our own frontend
                return json.load(response)
        except (OSError, ValueError):
            return None

    def models(self) -> list[str]:
        """Return the models that the frontend offers."""
        listed = self._get("/v1/models") or {"data": []}
        return [model["id"] for model in listed["data"]]

    def wait_model(self, timeout: float = 10.0) -> None:
        """Wait until the frontend offers the model."""
        eventually(lambda: self.model in self.models(), timeout, f"{self.model!r} in /v1/models")

    def wait_routed(self, worker: Worker, timeout: float = 30.0) -> None:
        """Wait until the frontend sends requests to this worker too: only then they can move to it."""

        def routed() -> bool:
            self.ask(1)
            return worker.metric('dynamo_worker_requests_total{outcome="completed"}') > 0

        eventually(routed, timeout, f"requests to reach the worker with pid {worker.pid}")

    def load(self, streams: int, tokens: int, prompt: str = "The quick brown fox.", **options: Any) -> Load:
        """Start streams in the background and wait until every one of them has received text."""
        bodies = [chat(self.model, f"{prompt}{number}", tokens, **options) for number in range(streams)]
        load = Load(self.url, bodies)
        eventually(load.started, 60, f"{streams} streams to start")
        return load

    def chat(self, prompt: str = "Hello, world!", max_tokens: int = 8, **options: Any) -> tuple[int, Any]:
        """Make one chat request without streaming; return status and answer."""
        body = chat(self.model, prompt, max_tokens, **{"stream": False, **options})
        return post(f"{self.url}/v1/chat/completions", body)

    def complete(self, prompt: str = "Hello, world!", max_tokens: int = 8, **options: Any) -> tuple[int, Any]:
        """Make one completion request without streaming; return status and answer."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **options}
        return post(f"{self.url}/v1/completions", body)

    def ask(self, tokens: int = 8, prompt: str = "Hello, world!") -> Result:
        """Make one request and return what came back."""
        return Load(self.url, [chat(self.model, prompt, tokens)]).wait()[0]

    def close(self) -> None:
        """End everything that still runs: workers gracefully, then by force."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
