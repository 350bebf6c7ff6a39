"""A worker whose memory, descriptors and liveness probe are watched while somebody means it harm."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker.testing import Cluster, eventually

from . import fuzz_client, live_probe

if TYPE_CHECKING:
    from typing_extensions import Self

PLUGINS = Path(__file__).parent.parent / "plugins"
#: How much more memory and how many more descriptors the worker's processes may have than at the beginning. The runtime
#: takes 60 MiB once, after some hundred errors, and no more in the next ten thousand (measured on 1.6.1).
MORE_MEMORY, MORE_DESCRIPTORS = 96 << 20, 4
#: Seconds that an answer of ``/live`` may take, without the time for which the machine had other work: in all cases;
#: and in all but one of a hundred, if `nox -s security` asks for it.
LIVE_ALWAYS = 2.0
LIVE_USUALLY = float(os.environ.get("DYNAMO_WORKER_TEST_LIVE", "inf"))
#: How many requests of each kind are made up, or examples of several.
EXAMPLES = int(os.environ.get("DYNAMO_WORKER_TEST_EXAMPLES", "150"))


@dataclass(frozen=True)
class Use:
    """What processes use: bytes of memory, and descriptors."""

    memory: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory >> 20} MiB and {self.descriptors} descriptors"


class Probe:
    """The other end of ``live_probe.py``."""

    def __init__(self, port: int, pid: int) -> None:
        command = [sys.executable, live_probe.__file__, str(port), str(pid)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline()

    def end(self) -> list[tuple[float, float, str]]:
        """Return all looks."""
        looks: list[tuple[float, float, str]] = json.loads(self._process.communicate(timeout=60)[0])
        return looks

    def kill(self) -> None:
        """End without a result."""
        with self._process:
            self._process.kill()


class Watched:
    """A worker of the echo engine, or of another one that tests have.

    :ivar worker: the worker.
    """

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        self.worker = cluster.worker("--grace-period", "0", *arguments, PYTHONPATH=str(PLUGINS))
        self.pid = self.worker.worker_pid
        self._probe: Probe | None = None
        self._before = Use(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._probe is not None:
            self._probe.kill()

    def use(self) -> Use:
        """Return what all processes of the worker use."""
        memory, descriptors = 0, 0
        for pid in (self.worker.pid, *self.worker.children()):
            match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            memory += int(match[1]) << 10 if match else 0
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        return Use(memory, descriptors)

    def busy(self) -> float:
        """Return for how many seconds the worker's event loop has had a core until now."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def begin(self) -> None:
        """Take the use until now for the usual one, and begin to ask whether it lives."""
        self._before = self.use()
        self._probe = Probe(self.worker.status_port, self.pid)

    def end(self) -> None:
        """Check that the worker is as it was and has always answered, and stop it."""
        assert self._probe is not None
        looks, self._probe = self._probe.end(), None
        # Descriptors first: connections end while we look.
        eventually(
            lambda: self.use().descriptors <= self._before.descriptors + MORE_DESCRIPTORS, 30, "as few descriptors"
        )
        eventually(lambda: self.worker.metric("dynamo_worker_in_flight") == 0, 30, "nothing to be in flight")
        now = self.use()
        wrong = [what for _, _, what in looks if what]
        lasted = [seconds for seconds, _, _ in looks]
        without_waiting = [max(0.0, seconds - waited) for seconds, waited, _ in looks]
        print(f"\nbefore {self._before}, after {now}")
        print(f"/live, {len(looks)} looks, {len(wrong)} without an answer: {figures(lasted)}")
        print(f"  without the time for which there was no core: {figures(without_waiting)}", flush=True)
        assert not wrong, wrong[:5]
        assert now.memory <= self._before.memory + MORE_MEMORY
        assert quantile(without_waiting, 0.99) <= LIVE_USUALLY
        assert max(without_waiting) <= LIVE_ALWAYS
        assert "Traceback" not in self.worker.log, self.worker.log[-5000:]
        assert "panicked" not in self.worker.log, self.worker.log[-5000:]
        self.worker.stop()


def quantile(values: list[float], which: float) -> float:
    """Return the value that this part of them does not exceed."""
    return sorted(values)[int(which * (len(values) - 1))]


def figures(values: list[float]) -> str:
    """Return what there is to know about times in seconds."""
    milliseconds = [1e3 * value for value in (statistics.median(values), quantile(values, 0.99), max(values))]
    return "median {:.1f}, p99 {:.1f}, longest {:.1f} ms".format(*milliseconds)


class Client:
    """The other end of ``fuzz_client.py``."""

    def __init__(self, cluster: Cluster) -> None:
        self._process = subprocess.Popen(
            [sys.executable, fuzz_client.__file__],
            env=cluster.environment(DYN_LOG="off"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the runtime writes a line for each request, whatever DYN_LOG says
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:
            self._process.kill()

    def ask(self, *requests: object) -> list[tuple[str, Any]]:
        """Make requests, all at once, and return how they ended."""
        fuzz_client.write(self._process.stdin, requests)
        answers: list[tuple[str, Any]] = fuzz_client.read(self._process.stdout)
        return answers
