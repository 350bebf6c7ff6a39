"""A small Dynamo cluster on one machine: private discovery, a frontend and workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker.cli.explain.account import unknowns
from dynamo_worker.cli.explain.records import of_file
from dynamo_worker.testing.client import Load, Result, chat
from dynamo_worker.testing.leftovers import MARKER
from dynamo_worker.testing.port_blocks import PortBlocks
from dynamo_worker.testing.sockets import Listener, listening
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.cli.explain.account import Account

#: Prefixes of variables that could connect a test to services outside of it.
_FOREIGN = ("DYN_", "DYNAMO_", "ETCD_", "NATS_", "OTEL_", "NOTIFY_SOCKET")


#: Variables that set the addresses on which workers and frontends listen.
_HOSTS = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")

_ports = PortBlocks()


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface, and that no other test on this machine gets.

    The port is below the range that the kernel uses for outgoing connections.

    :raises RuntimeError: tests have claimed all ports.
    """
    return _ports.next()


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send a JSON object with POST; return the HTTP status and the decoded response, or None if it is empty."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - our own servers
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, json.loads(content) if content else None


class Worker:
    """A ``dynamo-worker`` process and its descendants."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, cluster: Cluster, status_port: int) -> None:
        self._process = process
        self._log = log
        self._cluster = cluster
        self.started_at = time.monotonic()
        #: Port of ``/live``, ``/health`` and ``/metrics``.
        self.status_port = status_port
        #: Instance ID in discovery; empty until the worker is ready.
        self.instance = ""

    @property
    def pid(self) -> int:
        """PID of the started process: the supervisor, or the worker itself with ``--no-supervise``."""
        return self._process.pid

    @property
    def log(self) -> str:
        """All log output so far."""
        return self._log.read_text(errors="replace")

    @property
    def worker_pid(self) -> int:
        """PID of the worker process below the supervisor."""
        match = re.search(r"Starting worker .*pid=(\d+)", self.log)
        assert match, f"no worker process has started yet; log:\n{self.log}"
        return int(match[1])

    @property
    def run_dir(self) -> Path:
        """The worker's private directory, which the supervisor removes at the end."""
        return Path(self.wait_log(r"Worker started .*run_dir=(\S+)")[1])

    @property
    def guardian_pid(self) -> int:
        """PID of the process between supervisor and worker."""
        with open(f"/proc/{self.worker_pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[1])

    def wait_log(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """Wait until the log matches a regular expression, and return the match.

        :param timeout: longest time to wait, in seconds.
        :raises AssertionError: no match after ``timeout`` seconds, or the process ended first.
        """

        def search() -> re.Match[str] | None:
            # Check the process before reading the log, or its last line could be missed.
            gone = self._process.poll() is not None
            match = re.search(pattern, self.log)
            assert match or not gone, f"exited with {self._process.returncode} before logging {pattern!r}:\n{self.log}"
            return match

        found = eventually(search, timeout, f"{pattern!r} in the log of PID {self.pid}")
        assert found is not None
        return found

    def wait_ready(self, timeout: float | None = None) -> Worker:
        """Wait until the worker is ready, for ``timeout`` seconds or the cluster's ``start_seconds``."""
        seconds = self._cluster.start_seconds if timeout is None else timeout
        self.instance = self.wait_log(r"Worker ready .*instance=([0-9a-f]+)", seconds)[1]
        return self

    def wait_gone(self, timeout: float = 40.0) -> int:
        """Wait for the process to exit; return its exit code, or 128 + n if signal n killed it.

        :param timeout: longest time to wait, in seconds.
        :raises AssertionError: the process is still running after ``timeout`` seconds.
        """
        try:
            eventually(lambda: self._process.poll() is not None, timeout)
        except AssertionError:
            raise AssertionError(f"still running after {timeout:g} s; end of its log:\n{self.log[-4000:]}") from None
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    @property
    def running(self) -> bool:
        """Whether the started process is still running."""
        return self._process.poll() is None

    @property
    def registered(self) -> bool:
        """Whether the worker is registered in discovery."""
        return any(self.instance in path.name for path in self._cluster.discovery.rglob("*"))

    def explain(self) -> Account:
        """Return what ``dynamo-worker explain`` tells of this worker.

        :raises AssertionError: there is no flight record of it.
        """
        found = list(self._cluster.records.glob(f"dw-*-{self.pid}-*.jsonl"))
        assert len(found) == 1, f"expected one flight record of PID {self.pid}, found {found}; log:\n{self.log[-4000:]}"
        return of_file(str(found[0]))

    def check_explained(self, timeout: float = 10.0) -> None:
        """Check that the flight record of an ended worker tells the cause, the stage, what was cut and cleaned.

        :param timeout: longest time in seconds until it is complete: the guardian or the next start may complete it.
        :raises AssertionError: something is unknown, or the exit code is another one.
        """
        with contextlib.suppress(AssertionError):
            eventually(lambda: not unknowns(self.explain()), timeout, "a complete flight record", interval=0.05)
        told = self.explain()
        missing = unknowns(told)
        assert not missing, f"{told.file} does not tell {missing}:\n{json.dumps(told.as_json(), indent=1)[:6000]}"
        assert told.exit is not None
        code = self.wait_gone(0)
        assert told.exit.code == code, f"exit code {code}, but the flight record says {told.exit.code}"

    def stop(self) -> None:
        """Stop the worker with SIGTERM, and wait until it has exited.

        :raises AssertionError: the exit code is not 0, or the worker does not exit in time.
        """
        self.signal(signal.SIGTERM)
        code = self.wait_gone()
        assert code == 0, f"expected exit code 0, got {code}; end of the log:\n{self.log[-4000:]}"

    def signal(self, number: signal.Signals, pid: int | None = None) -> float:
        """Send a signal to the started process, or to ``pid``; return ``time.monotonic()`` just before."""
        now = time.monotonic()
        os.kill(pid or self.pid, number)
        return now

    def status(self, path: str) -> tuple[int, str]:
        """Request a path from the status server; return status 0 if it cannot be reached."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def operate(self, name: str, body: dict[str, Any] | None = None) -> Any:
        """Call the control route ``/engine/NAME``, and return the decoded response."""
        return post(f"http://127.0.0.1:{self.status_port}/engine/{name}", body or {})[1]

    def metric(self, name: str) -> float:
        """Return the sum of all samples of a metric on ``/metrics``; 0 if there are none."""
        samples = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", self.status("/metrics")[1], re.MULTILINE)
        return sum(map(float, samples))

    def children(self, below: int | None = None) -> dict[int, str]:
        """Return the PIDs and command lines of all descendants of a process; None stands for the started one."""
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                    parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(entry))
        found: dict[int, str] = {}
        waiting = [self.pid if below is None else below]
        while waiting:
            for child in parents.get(waiting.pop(), ()):
                with contextlib.suppress(OSError), open(f"/proc/{child}/cmdline", "rb") as file:
                    found[child] = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
                waiting.append(child)
        return found

    def listening(self) -> list[Listener]:
        """Return the TCP sockets on which the process and its descendants listen."""
        return listening([self.pid, *self.children()])

    def child(self, pattern: str) -> int:
        """Return the PID of the descendant whose command line matches a pattern.

        :raises AssertionError: no descendant matches, or more than one does.
        """
        return _only(pattern, self.children())

    def engine_process(self, pattern: str) -> int:
        """Return the PID of the engine's process whose command line matches a pattern.

        Only what runs below the worker counts, or was handed over to the guardian when its parent died: the command
        lines of the supervisor and the worker may match, too.

        :raises AssertionError: no process matches, or more than one does.
        """
        worker = self.worker_pid
        below = self.children(self.guardian_pid)
        return _only(pattern, {pid: command for pid, command in below.items() if pid != worker})


def _only(pattern: str, processes: dict[int, str]) -> int:
    found = [pid for pid, command in processes.items() if re.search(pattern, command)]
    assert len(found) == 1, f"expected {pattern!r} to match exactly one process, matches {found} of {processes}"
    return found[0]


class Cluster:
    """Workers, a frontend, and the discovery directory that connects them."""

    def __init__(self, directory: Path, tmp: Path, marker: str, *, engine_args: Sequence[str] = ()) -> None:
        """Create a cluster without any processes.

        :param directory: where to put discovery and logs.
        :param tmp: ``TMPDIR`` of all processes.
        :param marker: value of the environment variable that marks all processes.
        :param engine_args: arguments of every worker, ``--engine NAME`` first.
        """
        self.discovery = directory / "discovery"
        self.discovery.mkdir(0o700)
        #: Where the workers' flight records are.
        self.records = directory / "records"
        self.tmp = tmp
        self.engine_args = list(engine_args) or ["--engine", "echo"]
        #: The model name that clients send.
        self.model = "echo"
        #: Longest time in seconds until a worker is ready.
        self.start_seconds = 60.0
        #: URL of the frontend; empty until one is started.
        self.url = ""
        #: All workers that were started.
        self.workers: list[Worker] = []
        self._directory = directory
        self._marker = marker
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Return an environment that keeps all traffic on the loopback interface and in this cluster."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment |= {
            MARKER: self._marker,
            "TMPDIR": str(self.tmp),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.discovery),
            "DYN_WORKER_RECORD_DIR": str(self.records),
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
        """Run ``dynamo-worker`` with these arguments, and wait for it to exit."""
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
        """Start a worker without waiting until it is ready.

        :param prefix: a command that sets limits, for example, and then replaces itself with the worker.
        """
        status_port = free_port()
        number = len(self._processes)
        log = self._directory / f"worker-{number}.log"
        command = [sys.executable, "-m", "dynamo_worker", *self.engine_args, "--system-port", str(status_port)]
        process = self._start([*prefix, *command, *arguments], log, environment)
        self.workers.append(Worker(process, log, self, status_port))
        return self.workers[-1]

    def worker(self, *arguments: str, prefix: Sequence[str] = (), **environment: str | None) -> Worker:
        """Start a worker, and wait until it is ready."""
        return self.start_worker(*arguments, prefix=prefix, **environment).wait_ready()

    def worker_with_frontend(self, *arguments: str, host: str = "127.0.0.1", **environment: str | None) -> Worker:
        """Start a worker with an embedded frontend and default listen addresses; wait until both are ready.

        :param host: address on which the frontend listens.
        """
        port = free_port()
        hosts: dict[str, Any] = dict.fromkeys(_HOSTS)
        worker = self.worker("--frontend", f"{host}:{port}", *arguments, **{**hosts, **environment})
        self.url = f"http://{host}:{port}"
        return worker

    def serve(self, count: int, *arguments: str, frontend: Sequence[str] = ()) -> list[Worker]:
        """Start several workers at once, and a frontend unless one is running; wait until it offers the model.

        :param count: number of workers.
        :param arguments: arguments of each worker.
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
        """Start a frontend with request migration, and return its URL."""
        port = free_port()
        log = self._directory / f"frontend-{len(self._processes)}.log"
        command = [sys.executable, "-m", "dynamo_worker", "frontend", "--http", f"127.0.0.1:{port}", *arguments]
        self._start(command, log, {"DYN_LOG": "warn", **environment})
        self.url = f"http://127.0.0.1:{port}"
        try:
            eventually(lambda: self._get("/health") is not None, 30, "the frontend to answer /health")
        except AssertionError as error:
            raise AssertionError(f"{error}; its log:\n{log.read_text(errors='replace')[-4000:]}") from None
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
        """Return the names of the models that the frontend offers."""
        listed = self._get("/v1/models") or {"data": []}
        return [model["id"] for model in listed["data"]]

    def wait_model(self, timeout: float = 10.0) -> None:
        """Wait until the frontend offers the model."""
        eventually(lambda: self.model in self.models(), timeout, f"{self.model!r} to appear in /v1/models")

    def wait_routed(self, worker: Worker, timeout: float = 30.0) -> None:
        """Wait until the frontend routes requests to this worker; only then can requests migrate to it."""

        def routed() -> bool:
            self.ask(1)
            return worker.metric('dynamo_worker_requests_total{outcome="completed"}') > 0

        eventually(routed, timeout, f"the worker with PID {worker.pid} to complete a request")

    def load(self, streams: int, tokens: int, prompt: str = "The quick brown fox.", **options: Any) -> Load:
        """Start streams in the background, and wait until each has received text."""
        bodies = [chat(self.model, f"{prompt}{number}", tokens, **options) for number in range(streams)]
        load = Load(self.url, bodies)
        eventually(load.started, 60, f"{streams} streams to start")
        return load

    def chat(self, prompt: str = "Hello, world!", max_tokens: int = 8, **options: Any) -> tuple[int, Any]:
        """Send one chat request without streaming; return the HTTP status and the response."""
        body = chat(self.model, prompt, max_tokens, **{"stream": False, **options})
        return post(f"{self.url}/v1/chat/completions", body)

    def complete(self, prompt: str = "Hello, world!", max_tokens: int = 8, **options: Any) -> tuple[int, Any]:
        """Send one completion request without streaming; return the HTTP status and the response."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **options}
        return post(f"{self.url}/v1/completions", body)

    def embed(self, inputs: Any, **options: Any) -> tuple[int, Any]:
        """Send one request for embeddings; return the HTTP status and the response.

        :param inputs: ``input`` of OpenAI's API: texts or token ids, one or several.
        """
        return post(f"{self.url}/v1/embeddings", {"model": self.model, "input": inputs, **options})

    def ask(self, tokens: int = 8, prompt: str = "Hello, world!") -> Result:
        """Send one streaming chat request, and return its result."""
        return Load(self.url, [chat(self.model, prompt, tokens)]).wait()[0]

    def close(self) -> None:
        """Kill all processes that are still running."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
