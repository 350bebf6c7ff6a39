"""What the whole fleet shares: etcd, NATS where it is installed, and the frontends."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Final

from common.processes import Program
from dynamo_worker.testing import eventually
from dynamo_worker.testing.cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: Seconds for a server or a frontend to answer.
_START_SECONDS: Final = 60.0


class Nats:
    """A NATS server with JetStream, which needs the program ``nats-server``.

    :param directory: for its data and its log.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._port = free_port()
        self._directory = directory
        self._environment = environment
        self.url = f"nats://127.0.0.1:{self._port}"
        self.start()

    @staticmethod
    def installed() -> bool:
        """Return whether there is one."""
        return shutil.which("nats-server") is not None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ["nats-server", "-a", "127.0.0.1", "-p", str(self._port), "-js", "-sd", str(self._directory)]
        with self._directory.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=dict(self._environment), stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._listens, _START_SECONDS, "NATS", 0.05)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False

    def pause(self) -> None:
        """Stop it: it accepts connections and does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


class Frontend:
    """A frontend that is started again at the same address.

    :param name: what the accounts call it.
    """

    def __init__(self, name: str, environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"{name}.log"
        self._environment = environment
        #: Held by the fault that it is hit by.
        self.busy = threading.Lock()
        #: Whether it offers all models: only then does a load balancer send it requests.
        self.ready = False
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers.

        :raises AssertionError: it does not.
        """
        self.ready = False
        command = [sys.executable, "-m", "dynamo_worker", "frontend", "--discovery-backend", "etcd"]
        self.program = Program(self.name, [*command, "--http", f"127.0.0.1:{self.port}"], self._environment, self.log)
        try:
            eventually(lambda: self.answers() or not self.program.running, _START_SECONDS, "its answer", 0.05)
            assert self.program.running, f"it ended with code {self.program.code}"
        except AssertionError as error:
            raise AssertionError(f"{self.name} does not start: {error}\n{self.program.log_tail()}") from None

    def answers(self) -> bool:
        """Return whether it answers."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1):
            return True
        return False

    def offers(self, model: str) -> bool:
        """Return whether it offers a model."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/v1/models", timeout=2) as response:
            return f'"{model}"'.encode() in response.read()
        return False

    def wait_models(self, models: list[str]) -> None:
        """Wait until it offers all models, and is ready.

        :raises AssertionError: it does not.
        """
        eventually(lambda: all(map(self.offers, models)), _START_SECONDS, f"{models} at {self.name}", 0.1)
        self.ready = True


class Outages:
    """Knows since when etcd answers: what leaves it has to wait until then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._away = False
        self._back = time.monotonic()

    def begin(self) -> None:
        """Etcd is away from now on."""
        with self._lock:
            self._away = True

    def end(self) -> None:
        """Etcd is back."""
        with self._lock:
            self._away, self._back = False, time.monotonic()

    def away_since(self, since: float) -> bool:
        """Return whether etcd has been away at some time since a moment (monotonic)."""
        answers = self.answers_since
        return answers is None or answers > since

    @property
    def answers_since(self) -> float | None:
        """Since when it answers (monotonic); None while it is away."""
        with self._lock:
            return None if self._away else self._back
