"""Runs the supervisor as a real process with a fake worker, and checks after each test that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.supervisor import ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHILDREN = Path(__file__).parent / "children"
WORKER = CHILDREN / "worker.py"

_PROGRAM = """
import sys
from dynamo_worker.supervisor import supervise
sys.exit(supervise(sys.argv[2:], command=[sys.executable, sys.argv[1]]))
"""

#: The machine is noisy: bars are asserted with this factor, and printed as measured.
NOISE = 3.0


def wait_until(condition: Callable[[], object], timeout: float = 15.0, what: str = "") -> float:
    """Return how long it took until ``condition`` was true; fail if it never is."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            pytest.fail(f"not within {timeout} s: {what or condition}")
        time.sleep(0.005)
    return time.monotonic() - started


def state_of(pid: int) -> str | None:
    """Return the state letter of a process, None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


class Supervised:
    """One supervisor with its tree, in an environment that marks every process of it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mark = f"DWTEST_MARK={uuid.uuid4().hex}"
        self.tmp = Path(tempfile.mkdtemp(prefix="dwt-"))  # pytest's own are too long for unix sockets
        self.log = base / "log"
        self.termination_message = base / "termination-log"
        self.shm_names = base / "shm"
        self.shm_names.touch()
        name, _, value = self.mark.partition("=")
        self.environment = {
            **os.environ,
            name: value,
            "TMPDIR": str(self.tmp),
            "SHM_NAMES": str(self.shm_names),
            "DYN_WORKER_TERMINATION_MESSAGE_PATH": str(self.termination_message),
            "DYN_WORKER_RECORD_DIR": str(base / "records"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, *steps: str, worker: Path | str = WORKER, shell_wrapper: str | None = None, **popen: object
    ) -> Supervised:
        """Start the supervisor; wait until the worker has come to the step ``arrived``, if there is one."""
        wrapper = [] if shell_wrapper is None else ["/bin/sh", "-c", shell_wrapper]
        arrived = self.base / f"arrived-{uuid.uuid4().hex}"
        steps_with_mark = [step if step != "arrived" else f"touch={arrived}" for step in steps]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-c", _PROGRAM, str(worker), *steps_with_mark],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                **{"stdout": log, "stderr": log, **popen},  # type: ignore[call-overload]
            )
        if "arrived" in steps:
            wait_until(lambda: arrived.exists() or self.process.poll() is not None, what="worker up")
            assert arrived.exists(), self.text
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def reason(self) -> str:
        """The termination message."""
        return self.termination_message.read_text()

    def children_of(self, pid: int) -> list[int]:
        found = []
        for entry in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in entry.read_text().split()]
        return found

    @property
    def guardian(self) -> int:
        pids = [pid for pid in self.children_of(self.pid) if Path(f"/proc/{pid}/comm").read_text() == "dw-guardian\n"]
        assert len(pids) == 1
        return pids[0]

    @property
    def worker(self) -> int:
        pids = [
            pid
            for pid in self.children_of(self.guardian)
            if os.getsid(pid) == pid and WORKER.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(pids) == 1
        return pids[0]

    @property
    def run_directories(self) -> list[Path]:
        return list(self.tmp.glob("dw-*"))

    def tree(self) -> set[int]:
        """Return every living process that descends from this supervisor, and itself."""
        mark = self.mark.encode()
        pids = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0") and state_of(int(entry)) != "Z":
                        pids.add(int(entry))
        return pids

    def segments(self) -> list[str]:
        """Return which of the segments that the children have told us of are still there."""
        return [name for name in self.shm_names.read_text().split() if Path("/dev/shm", name).exists()]

    def recorded_processes(self) -> set[int]:
        """Return the pids that the guardian has recorded."""
        return {pid for directory in self.run_directories for pid, _ in ledger.read_processes(directory)}

    def recorded(self) -> set[str]:
        """Return the names of the segments that the guardian has recorded."""
        names: set[str] = set()
        for directory in self.run_directories:
            names |= {name for name, _ in ledger.read_segments(directory)}
        return names

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 30.0) -> int:
        """Return the supervisor's exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def take_the_record(self, timeout: float) -> None:
        """Wait until only the record of a registration is left for the next start, and remove it as that would."""

        def alone() -> bool:
            return [sorted(os.listdir(path)) for path in self.run_directories] == [["ledger.jsonl", "owner"]]

        wait_until(alone, timeout, "only the record left")
        shutil.rmtree(self.run_directories[0])

    def gone(self, timeout: float = 15.0) -> float:
        """Return how long it took until nothing was left."""
        return wait_until(
            lambda: not self.tree() and not self.run_directories and not self.segments(), timeout, "nothing left"
        )

    def events(self) -> list[dict[str, object]]:
        """Return the log lines of a JSON log."""
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]

    def patch(self, code: str) -> None:
        """Have every Python process of the tree run some code when it starts."""
        site = self.base / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(textwrap.dedent(code))
        self.environment["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"

    def end(self) -> None:
        """Kill what a failed test has left."""
        for pid in self.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in self.segments():
            Path("/dev/shm", name).unlink()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.tmp, ignore_errors=True)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """A supervisor to start; afterwards there must be no process, no segment and no run directory left of it."""
    it = Supervised(tmp_path)
    try:
        yield it
        print(it.text)
        for _ in range(3):  # a test that failed half-way
            if it.process is not None and it.process.poll() is None:
                it.signal(signal.SIGTERM)
                time.sleep(0.12)
        if it.process is not None:
            it.wait()
        wait_until(lambda: not it.tree(), 5.0, "no process left")
        assert it.segments() == []
        assert it.run_directories == []
    finally:
        it.end()


@pytest.fixture
def measured(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str, float, float], None]:
    """Print a measured value beside its bar; fail only far beyond it, because the machine is shared."""

    def check(what: str, seconds: float, bar: float) -> None:
        with capsys.disabled():
            print(f"\n  measured: {what}: {seconds:.3f} (bar {bar})", end="")
        assert seconds <= bar * NOISE

    return check
