"""One round of random faults: start a worker, inject the faults, and check what is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.leftovers import MARKER, mapped_by_others, marked_processes, shared_memory
from dynamo_worker.testing.limits import FILLING, limited, possible
from dynamo_worker.testing.random_draws import (
    DEADLY,
    GRACE,
    HEARTBEAT,
    STAGES,
    STOPPING,
    TERMINATION,
    Draw,
    Hit,
    allowed,
    stages_between,
)
from dynamo_worker.testing.random_place import TRICKLE_TOKENS, Place, Trickle
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.testing.cluster import Worker
    from dynamo_worker.testing.limits import Limit

#: Tolerance in seconds for everything that must end by a deadline; machines that run tests are busy.
_LATE = 8.0
#: Number of streams through the shared frontend, and through the embedded one.
_STREAMS, _OWN_STREAMS = 4, 2
#: Messages that a worker must never log, whatever signals are sent.
TROUBLE = (
    "Shutdown stage failed",
    "Guardian failed",
    "this is a bug",
    "Monitor failed",
    "Cleaning up after an earlier worker failed",
    "malformed control message",
    "Run directory not removed",
)
#: Messages that are only expected after the guardian was hit.
GUARDIAN_TROUBLE = ("Guardian died", "Guardian is not responding")


class Round:
    """One round, from the start of a worker until its last trace is gone."""

    def __init__(self, place: Place, drawn: Draw) -> None:
        self.drawn = drawn
        #: Everything that went wrong, one line each.
        self.problems: list[str] = []
        self.code: int | None = None
        self.seconds = 0.0
        self.log = ""
        self._place, self._cluster, self._subject = place, place.cluster, place.subject
        self._limit = drawn.limit if possible(drawn.limit) else "none"
        self._marker = uuid.uuid4().hex
        self._tmp = Path(tempfile.mkdtemp(prefix="dwr-"))
        self._registered = self._registrations()
        self._segments = shared_memory()
        # Each hit with the interval in which it takes effect.
        self._hits: list[tuple[Hit, float, float]] = []
        self._stop_asked = False
        self._own_url = f"http://127.0.0.1:{free_port()}"  # of the embedded frontend
        # Each load with its prompts, and the tokens per stream.
        self._streams: list[tuple[Load, list[str], int]] = []
        self._own_streams: list[tuple[Load, list[str], int]] = []

    def run(self) -> None:
        """Run the round; record everything that goes wrong in ``problems``."""
        began = time.monotonic()
        try:
            with limited(self._limit, self.drawn.amount, self._tmp) as limit:
                worker = self._start(limit.prefix)
                try:
                    self._live(worker, limit)
                    self._check_code(worker)
                    self._check_leftovers()
                    self._check_log(worker)
                    self._check_streams()
                finally:
                    self.log = worker.log
        except AssertionError as error:
            self.problems.append(str(error))
        finally:
            for pid in marked_processes(self._marker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._tmp, ignore_errors=True)
        self.seconds = time.monotonic() - began

    # ------------------------------------------------------------------------------------------------------- acting

    def _start(self, prefix: Sequence[str]) -> Worker:
        frontend = ["--frontend", self._own_url.removeprefix("http://")] if self.drawn.frontend else []
        bounds = {
            "--termination-grace-period": TERMINATION,
            "--heartbeat-timeout": HEARTBEAT,
            "--stall-timeout": self._subject.stall_timeout,
            "--grace-period": GRACE if self.drawn.moment == "grace" else 0,
        }
        environment: dict[str, Any] = {MARKER: self._marker, "TMPDIR": str(self._tmp)}
        return self._cluster.start_worker(
            *[part for flag, value in bounds.items() for part in (flag, str(value))],
            *["--drain", self.drawn.drain, *frontend],
            prefix=prefix,
            **environment,
        )

    def _live(self, worker: Worker, limit: Limit) -> None:
        """Bring the worker to the drawn moment, hit it, and wait for its exit."""
        with contextlib.ExitStack() as stack:
            if self._reach(worker):
                if self.drawn.moment not in ("start", "idle"):
                    trickle = stack.enter_context(Trickle(self._cluster))
                    stack.callback(self._take_over, trickle)
                self._hit(worker, limit)
                self._settle(worker)
            self.code = worker.wait_gone(TERMINATION + _LATE)

    def _frontend_outlives(self) -> bool:
        """Return whether the embedded frontend must finish its streams, even if the worker is gone."""
        stops = [hit for hit, _, _ in self._hits if hit.victim in ("supervisor", "worker") and hit.number in STOPPING]
        forced = len(stops) + self._stop_asked > 1 or signal.SIGQUIT in [hit.number for hit in stops]
        hurt = "frontend" in {hit.victim for hit, _, _ in self._hits}
        return self._limit == "none" and not (forced or hurt or self._orphaned)

    def _take_over(self, trickle: Trickle) -> None:
        self._streams += [(load, ["trickle"], TRICKLE_TOKENS) for load in trickle.loads]

    def _reach(self, worker: Worker) -> bool:
        """Wait for the drawn moment; return False if the worker does not get that far."""
        if self.drawn.moment == "start":
            time.sleep(self.drawn.fraction * self._place.start_seconds)
            return worker.running
        if not self._says(worker, "Worker ready", self._subject.start_seconds):
            return False
        worker.wait_ready()
        if self.drawn.moment == "idle":
            return True
        with contextlib.suppress(AssertionError):  # a worker short of a resource may never receive a request
            self._cluster.wait_routed(worker, 3.0)
        self._streams.append(self._ask(self._cluster.url, _STREAMS))
        if self.drawn.frontend:
            self._own_streams.append(self._ask(self._own_url, _OWN_STREAMS))
        for load, _, _ in (*self._streams, *self._own_streams):
            eventually(load.started, 30, "the streams to start")
        if self.drawn.moment == "busy":
            return worker.running
        with contextlib.suppress(ProcessLookupError):
            worker.signal(signal.SIGTERM)
        self._stop_asked = True
        stage = {"grace": "Grace period", "draining": "Draining", "cleanup": "Cleaning up worker"}[self.drawn.moment]
        return self._says(worker, stage, TERMINATION)

    def _ask(self, url: str, count: int) -> tuple[Load, list[str], int]:
        """Start streams through a frontend; return them with their prompts and the number of tokens."""
        prompts, tokens = [f"round{number}" for number in range(count)], self._subject.stream_tokens
        return Load(url, [chat(self._subject.model, prompt, tokens) for prompt in prompts]), prompts, tokens

    def _says(self, worker: Worker, pattern: str, timeout: float) -> bool:
        """Wait for a pattern in the log; return False if the worker exits first or the time is up."""
        until = time.monotonic() + timeout
        while worker.running and time.monotonic() < until:
            if re.search(pattern, worker.log):
                return True
            time.sleep(0.001)
        return False

    def _hit(self, worker: Worker, limit: Limit) -> None:
        """Tighten the limit, then send the signals."""
        victims = self._victims(worker)
        self._place.segments.update(dict.fromkeys(_mapped_by(worker), self._marker))
        if self.drawn.amount is None:
            limit.tighten([pid for pid in worker.children() if pid != self._processes(worker).get("guardian")])
        due = time.monotonic()
        timeline: list[tuple[float, Hit, signal.Signals]] = []
        stopped_until: dict[str, float] = {}  # until when each process is suspended and reacts to SIGKILL only
        for hit in self.drawn.hits:
            due += hit.after
            timeline.append((due, hit, hit.number))
            if hit.number == signal.SIGSTOP:
                timeline.append((due + hit.stopped, hit, signal.SIGCONT))
        for at, hit, number in sorted(timeline, key=lambda entry: entry[0]):
            time.sleep(max(0.0, at - time.monotonic()))
            if hit.victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(victims[hit.victim], number)
                    if number is hit.number:
                        now = time.monotonic()
                        late = (
                            max(0.0, stopped_until.get(hit.victim, 0.0) - now) if number is not signal.SIGKILL else 0.0
                        )
                        self._hits.append((hit, time.time(), time.time() + late))
                        if hit.stopped:
                            stopped_until[hit.victim] = now + hit.stopped
        for descriptor in victims.values():
            os.close(descriptor)

    def _victims(self, worker: Worker) -> dict[str, int]:
        """Return pidfds of the victims; during startup, wait until they exist."""
        wanted = {hit.victim for hit in self.drawn.hits}
        found: dict[str, int] = {}
        until = time.monotonic() + (2 * self._place.start_seconds if self.drawn.moment == "start" else 0.0)
        while True:
            for name, pid in self._processes(worker).items():
                if name in wanted and name not in found:
                    with contextlib.suppress(OSError):
                        found[name] = os.pidfd_open(pid)
            if len(found) == len(wanted) or time.monotonic() >= until or not worker.running:
                return found
            time.sleep(0.001)

    def _processes(self, worker: Worker) -> dict[str, int]:
        """Return the PIDs of the worker's existing processes by name."""
        found = {"supervisor": worker.pid}
        children = worker.children()
        for pid in children:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
                parent = int(rest.split()[1])
                if name == "dw-guardian" and parent == worker.pid:
                    found["guardian"] = pid
                elif parent == found.get("guardian") and "--no-supervise" in children[pid]:
                    found["worker"] = pid
        others = {pid: command for pid, command in children.items() if pid not in found.values()}
        for name, pattern in {**self._subject.processes, "frontend": r"dynamo_worker frontend"}.items():
            found.update((name, pid) for pid, command in others.items() if re.search(pattern, command))
        return found

    def _settle(self, worker: Worker) -> None:
        """Let the hits take effect; a worker that survives them must serve, and is stopped."""
        signalled = any(hit.victim in ("supervisor", "worker") and hit.number in STOPPING for hit, _, _ in self._hits)
        if self._stop_asked or signalled or int(ExitCode.STOPPED) not in self._allowed(worker.log):
            return
        if self.drawn.moment == "start":
            self._says(worker, "Worker ready", self._subject.start_seconds)
        else:
            with contextlib.suppress(AssertionError):
                eventually(lambda: not worker.running, 0.3)
        if self._limit == "none":
            try:
                eventually(lambda: not worker.running or worker.status("/health")[0] == 200, TERMINATION)
            except AssertionError:
                self.problems.append(f"the worker neither serves nor exits; /health: {worker.status('/health')}")
        with contextlib.suppress(ProcessLookupError):
            worker.signal(signal.SIGTERM)

    # ----------------------------------------------------------------------------------------------------- checking

    def _allowed(self, log: str) -> set[int]:
        everything = {"fork", *STAGES}  # a limit on file sizes may have truncated the log, too
        hits = [
            (hit, everything if self._limit == "file size" else stages_between(log, begin, end))
            for hit, begin, end in self._hits
        ]
        return allowed(self._limit, hits, self._subject.stall_timeout, stop_asked=self._stop_asked)

    def _check_code(self, worker: Worker) -> None:
        codes = self._allowed(worker.log)
        if self.code not in codes:
            self.problems.append(f"expected an exit code of {sorted(codes)}, got {self.code}")

    def _check_log(self, worker: Worker) -> None:
        """Check that the log gives a reason, and contains no errors that the faults do not explain."""
        victims = {hit.victim for hit, _, _ in self._hits if hit.number is not signal.SIGSTOP}
        early = victims and "Worker started" not in worker.log
        if not (self._limit == "file size" or {"supervisor", "guardian"} <= victims or early):
            try:
                # If the supervisor dies at the very end, only the worker's last line is left.
                last = "|Worker process ends exit_code=.* reason=" if "supervisor" in victims else ""
                eventually(lambda: re.search(f"Worker stopped|Worker not started{last}", worker.log), 2)
            except AssertionError:  # a guardian that outlives its supervisor logs one, too
                self.problems.append("no reason in the log")
        log = worker.log
        if self._limit != "none":
            return
        self.problems += [f"{pattern!r} in the log" for pattern in TROUBLE if pattern in log]
        if "Traceback" in log and not any(hit.number is signal.SIGINT for hit, _, _ in self._hits):
            self.problems.append("a traceback in the log")
        if "guardian" not in {hit.victim for hit, _, _ in self._hits}:
            self.problems += [f"{pattern!r} in the log" for pattern in GUARDIAN_TROUBLE if pattern in log]

    def _check_leftovers(self) -> None:
        """Wait until nothing is left; if both owners were killed, the next start must clean up."""
        left = self._wait_clean(1.0 if self._orphaned else _LATE)
        if left and self._orphaned:
            (self._tmp / FILLING).unlink(missing_ok=True)
            heir = self._start(())
            self._says(heir, "Worker ready", self._subject.start_seconds)
            heir.wait_ready()
            left = self._wait_clean(_LATE, heir)
            heir.stop()
            left += self._wait_clean(_LATE)
        if left:
            self.problems.append("left behind: " + "; ".join(left[:6]))

    @property
    def _orphaned(self) -> bool:
        """Whether both supervisor and guardian were killed, or may have been."""
        ended = {hit.victim for hit, _, _ in self._hits if hit.number in (*DEADLY, *STOPPING)}
        return {"supervisor", "guardian"} <= ended

    def _wait_clean(self, timeout: float, heir: Worker | None = None) -> list[str]:
        """Wait until nothing is left; return what remains after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while (left := self._left(heir)) and time.monotonic() < until:
            time.sleep(0.02)
        return left

    def _left(self, heir: Worker | None) -> list[str]:
        """Describe what is left, one line each, except for what belongs to the next worker."""
        processes = marked_processes(self._marker)
        registrations = self._registrations() - self._registered
        files = {path.name for path in self._tmp.iterdir()} - {FILLING}
        if heir is not None:
            own = {heir.pid, *heir.children()}
            processes = {pid: command for pid, command in processes.items() if pid not in own}
            registrations = {name for name in registrations if heir.instance not in name}
            files -= set(re.findall(r"run_dir=\S*/(dw-\S+)", heir.log)[:1])
        segments = shared_memory() - self._segments
        if self._orphaned and self._limit != "none":
            # Without a record, which may be missing here, a directory is only removed once it is a minute old.
            segments.clear()
            files.clear()
        # Rounds run in parallel: ignore segments that a process of another round maps, or has mapped.
        segments -= {name for name in segments if self._place.segments.get(name, self._marker) != self._marker}
        segments -= mapped_by_others(segments, self._marker)
        if heir is not None and segments:
            segments -= _mapped_by(heir)
        left = [f"process {pid}: {command[-80:]}" for pid, command in processes.items()]
        left += [f"registration {name}" for name in sorted(registrations)]
        left += [f"file {name}" for name in sorted(files)]
        return left + [f"segment {name}" for name in sorted(segments)]

    def _registrations(self) -> set[str]:
        """Return all files in the discovery directory, except the store's unfinished drafts."""
        root = self._cluster.discovery
        found = {path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".tmp_")}
        return {str(path.relative_to(root)) for path in found}

    def _check_streams(self) -> None:
        own = self._own_streams if self._frontend_outlives() else []
        for load, prompts, tokens in (*self._streams, *own):
            for prompt, result in zip(prompts, load.wait(60), strict=True):
                expected = self._subject.expected(prompt, tokens) if self._subject.expected else result.text
                if not result.ok or result.text != expected:
                    through = "the embedded frontend" if load in [each[0] for each in own] else "the frontend"
                    lost = f"{result.status} {result.error}, {len(result.text)} of {tokens} tokens"
                    self.problems.append(f"lost a stream through {through}: {lost}")
        for load, _, _ in self._own_streams:
            load.wait(60)
        if not self._place.spare.running:
            self.problems.append(f"the other worker has exited: {self._place.spare.log[-1000:]}")


def _mapped_by(worker: Worker) -> set[str]:
    """Return the shared-memory segments that a worker's processes map."""
    names = set()
    for pid in worker.children():
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    return names
