"""The fleet: places with a worker each, which is watched, replaced when it ends, and searched for leftovers."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chaos_run import table
from chaos_run.orphans import Orphans
from chaos_run.plan import Place
from chaos_run.servers import Frontend, Nats, Outages
from dynamo_worker.testing import Cluster, Worker, eventually, tiny_model
from dynamo_worker.testing.etcd_server import Etcd
from dynamo_worker.testing.leftovers import MARKER, mapped_by_others, marked_processes, shared_memory
from dynamo_worker.testing.limits import FILLING, possible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chaos_run.accounts import Accounts
    from chaos_run.clients import Model

_HOOKS: Final = Path(__file__).parent.parent / "workers"
#: Where the supervisor says why the worker ended, and the guardian once that is dead.
_ENDS: Final = (
    r'dynamo_worker\S*: (?:Worker stopped|Worker not started) code=\d+ reason=(?P<reason>"(?:\\.|[^"\\])*"|\S+)',
    r"dynamo_worker\S*: Worker stopped by (?P<reason>the guardian, without a supervisor)",
)
#: Settings of all workers.
_SETTINGS: Final = {
    "--termination-grace-period": table.TERMINATION,
    "--grace-period": table.GRACE,
    "--heartbeat-timeout": table.HEARTBEAT,
    "--stall-timeout": table.STALL,
    "--health-check-interval": table.HEALTH_INTERVAL,
    "--health-check-timeout": table.HEALTH_TIMEOUT,
    "--engine-shutdown-timeout": table.CLEANUP_TIMEOUT,
}
#: Size of a place's temporary file system.
_TMP_SIZE: Final = "2m"


@dataclass(frozen=True)
class Engine:
    """An engine of the fleet.

    :param name: kind of the places where it runs.
    :param flags: of its workers, ``--engine`` first.
    :param model: the model that clients ask for.
    :param processes: its own processes: patterns of their command lines by name.
    :param start_seconds: longest time until a worker is ready.
    :param moves: whether requests move to another worker.
    :param environment: further variables of its workers.
    :param tiny_model: whether it loads the test kit's tiny model, whose directory stands for ``{model}`` in its flags.
    """

    name: str
    flags: Sequence[str]
    model: Model
    processes: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 90.0
    moves: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    tiny_model: bool = False


class Member:
    """A worker of the fleet, with what only this one has.

    :param marker: marks its processes.
    :param hooks: the file that tells its hooks what goes wrong.
    """

    def __init__(self, name: str, worker: Worker, marker: str, hooks: Path) -> None:
        self.name = name
        self.worker = worker
        self.marker = marker
        self.hooks = hooks
        #: What is being done to it; empty: it must not end.
        self.fault = ""
        #: When it ended (monotonic); None while it runs.
        self.ended_at: float | None = None
        self.ended = threading.Event()
        #: Segments that its processes had mapped.
        self.segments: set[str] = set()

    def note_segments(self) -> None:
        """Remember the shared memory that its processes map now."""
        for pid in self.worker.children():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
                self.segments |= set(re.findall(r"/dev/shm/(\S+)", maps))

    def reason(self) -> str:
        """Return why it ended, from the last line of its log; empty if there is none."""
        log = self.worker.log
        found = [found for pattern in _ENDS for found in re.finditer(pattern, log)]
        return found[0]["reason"].strip('"') if found else ""

    def tail(self, characters: int = 3000) -> str:
        """Return the end of its log."""
        return self.worker.log[-characters:]


class Slot:
    """A place with its workers: one that serves, and one more during an upgrade or a start that is hit."""

    def __init__(self, place: Place, engine: Engine, tmp: Path, mounted: bool) -> None:
        self.place = place
        self.engine = engine
        self.tmp = tmp
        self.mounted = mounted
        #: Held by the fault that it is hit by.
        self.busy = threading.Lock()
        self.member: Member | None = None
        #: All workers that may have files in the place.
        self.living: list[Member] = []
        self.healthy = False

    def fill(self) -> None:
        """Leave no room for temporary files."""
        status = os.statvfs(self.tmp)
        with contextlib.suppress(OSError), open(self.tmp / FILLING, "wb", buffering=0) as file:
            file.write(bytes(status.f_bavail * status.f_frsize))

    def empty(self) -> None:
        """Make room again."""
        (self.tmp / FILLING).unlink(missing_ok=True)


class Fleet:
    """All processes of a run. :meth:`close` ends everything, however far the start got.

    :param directory: for discovery, data and logs.
    :param engines: each runs in ``workers`` places.
    """

    def __init__(
        self, directory: Path, engines: Sequence[Engine], workers: int, frontends: int, accounts: Accounts
    ) -> None:
        self._directory = directory
        self._engines = engines
        self._accounts = accounts
        self._run = uuid.uuid4().hex
        self._numbers = 0
        self._lock = threading.RLock()
        self._frontends = frontends
        self._workers = workers
        self.outages = Outages()
        #: Held while etcd or NATS is away.
        self.server_busy = threading.Lock()
        self.markers: list[str] = []
        self.slots: dict[str, Slot] = {}
        self.frontends: dict[str, Frontend] = {}
        self.etcd: Etcd | None = None
        self.nats: Nats | None = None
        self.segments_before = shared_memory()
        self._orphans = Orphans(self._children)
        self._clusters: dict[str, Cluster] = {}
        self._watching: dict[int, tuple[Slot, Member]] = {}
        self._poller = select.epoll()
        self._closed = threading.Event()
        #: Called when a worker ends to which nothing was done.
        self.on_surprise: Callable[[Slot, Member], None] = lambda _slot, _member: None
        self._watcher = threading.Thread(target=self._watch, name="watch workers", daemon=True)
        self.abilities = abilities()

    # --- Start and end

    def start(self) -> None:
        """Start everything, and wait until all models are offered."""
        (self._directory / "logs").mkdir()
        for engine in self._engines:
            directory = self._directory / engine.name
            directory.mkdir()
            flags = list(engine.flags)
            if engine.tiny_model:
                flags = [flag.replace("{model}", str(self._tiny_model())) for flag in flags]
            cluster = Cluster(directory, self._directory, self._run, engine_args=flags)
            cluster.model, cluster.start_seconds = engine.model.name, engine.start_seconds
            self._clusters[engine.name] = cluster
        plain = next(iter(self._clusters.values())).environment(**{MARKER: self._marker()})
        self.etcd = Etcd(self._directory / "etcd", plain)
        if "nats" in self.abilities:
            self.nats = Nats(self._directory / "nats", plain)
        self._watcher.start()
        for engine in self._engines:
            for place in places([engine], self._workers):
                slot = self._slot(engine, place)
                slot.member = self.launch(slot, "complete")
        for name in frontend_names(self._frontends):
            self.frontends[name] = Frontend(name, {**plain, **self.environment()}, self._directory / "logs")
        for slot in self.slots.values():
            assert slot.member is not None
            slot.member.worker.wait_ready()
        for frontend in self.frontends.values():
            frontend.wait_models(self.models)

    def _tiny_model(self) -> Path:
        """Return the directory of the tiny model, made if need be."""
        directory = self._directory / "model" / "tiny"
        if not directory.exists():
            tiny_model.make(directory)
        return directory

    @property
    def models(self) -> list[str]:
        """The names of all models."""
        return sorted({engine.model.name for engine in self._engines})

    def environment(self) -> dict[str, str]:
        """Return what workers and frontends have in common."""
        assert self.etcd is not None
        shared = {
            "DYN_DISCOVERY_BACKEND": "etcd",
            "ETCD_ENDPOINTS": self.etcd.url,
            "DYN_LOG": "warn",
            # Frontends that are stopped have to finish the longest stream.
            "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "20",
            "HOME": str(self._directory),
        }
        if self.nats is not None:
            shared |= {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": self.nats.url}
        return shared

    def _slot(self, engine: Engine, place: Place) -> Slot:
        tmp = self._directory / "tmp" / place.name
        tmp.mkdir(parents=True, mode=0o700)
        mounted = "tmp" in self.abilities
        if mounted:
            options = f"size={_TMP_SIZE},mode=700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp)], check=True)
        slot = self.slots[place.name] = Slot(place, engine, tmp, mounted)
        return slot

    def _marker(self) -> str:
        with self._lock:
            marker = f"{self._run}-{self._numbers}"
            self._numbers += 1
            self.markers.append(marker)
        return marker

    def close(self) -> None:
        """Kill everything that still runs, and remove what was mounted."""
        self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join(5.0)
        left = set(self.markers)
        for marker in left:
            for pid in marked_processes(marker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for slot in self.slots.values():
            for member in list(slot.living):
                with contextlib.suppress(AssertionError):
                    member.worker.wait_gone(5.0)
            if slot.mounted:
                subprocess.run(["umount", "--lazy", str(slot.tmp)], check=False)
        for frontend in self.frontends.values():
            frontend.program.wait(5.0)
        for server in (self.etcd, self.nats):
            if server is not None:
                server.kill()

    # --- Workers

    def launch(self, slot: Slot, mode: str) -> Member:
        """Start a worker in a place; it does not serve in it yet.

        :param mode: its drain mode.
        """
        marker = self._marker()
        name = f"{slot.place.name}.{marker.rpartition('-')[2]}"
        hooks = self._directory / slot.engine.name / f"{name}.hooks"
        settings = [part for flag, value in _SETTINGS.items() for part in (flag, str(value))]
        own: dict[str, Any] = {
            MARKER: marker,
            "TMPDIR": str(slot.tmp),
            "PYTHONPATH": str(_HOOKS),
            "CHAOS_HOOKS": str(hooks),
        }
        with self._lock:
            worker = self._clusters[slot.engine.name].start_worker(
                *settings,
                # An endpoint serves one model.
                *("--component", slot.place.group, "--drain", mode, "-p", "chaos_hooks"),
                **{**self.environment(), **own, **slot.engine.environment},
            )
            member = Member(name, worker, marker, hooks)
            slot.living.append(member)
            descriptor = os.pidfd_open(worker.pid)
            self._watching[descriptor] = (slot, member)
            self._poller.register(descriptor, select.EPOLLIN)
        return member

    def _watch(self) -> None:
        """Note when workers end; those to which nothing was done are reported."""
        while not self._closed.is_set():
            for descriptor, _ in self._poller.poll(0.5):
                now = time.monotonic()
                with self._lock:
                    slot, member = self._watching.pop(descriptor)
                self._poller.unregister(descriptor)
                os.close(descriptor)
                member.ended_at = now
                if slot.member is member:
                    self.set_healthy(slot, healthy=False)
                member.ended.set()
                if not member.fault and not self._closed.is_set():
                    self.on_surprise(slot, member)
            self._orphans.reap()

    def _children(self) -> set[int]:
        """Return the pids of all processes that somebody waits for."""
        with self._lock:
            known = {member.worker.pid for slot in self.slots.values() for member in slot.living}
        known |= {frontend.program.pid for frontend in self.frontends.values()}
        return known | {server.process.pid for server in (self.etcd, self.nats) if server is not None}

    def set_healthy(self, slot: Slot, *, healthy: bool) -> None:
        """Note whether the worker of a place can take requests of others."""
        with self._lock:
            slot.healthy = healthy
            count = sum(each.healthy for each in self.slots.values() if each.place.group == slot.place.group)
            self._accounts.healthy(slot.place.group, count, time.monotonic())

    def others_healthy(self, slot: Slot) -> int:
        """Return how many other places of the same model have a healthy worker to which nothing is being done."""
        with self._lock:
            return sum(
                other.healthy and not other.busy.locked()
                for other in self.slots.values()
                if other is not slot and other.place.group == slot.place.group
            )

    def wait_routed(self, member: Member, timeout: float = 60.0) -> None:
        """Wait until a worker has completed a client's request: frontends know it.

        :raises AssertionError: it has not.
        """
        completed = 'dynamo_worker_requests_total{outcome="completed"}'
        eventually(
            lambda: member.ended.is_set() or member.worker.metric(completed) > 0,
            timeout, f"a request for {member.name}", 0.2,
        )  # fmt: skip
        assert not member.ended.is_set(), f"{member.name} ended before it served"

    # --- Leftovers

    def left_by(self, slot: Slot, member: Member) -> list[str]:
        """Return what a worker that has ended left behind, without its entries in discovery."""
        left = [f"process {pid}: {command[-100:]}" for pid, command in marked_processes(member.marker).items()]
        with self._lock:
            living = [other for other in slot.living if other is not member]
        others = tuple(f"dw-{other.worker.pid}-" for other in living)
        files = [path.name for path in slot.tmp.iterdir() if path.name != FILLING]
        left += [f"file {name}" for name in sorted(files) if not name.startswith(others)]
        segments = (member.segments - self.segments_before) & shared_memory()
        for other in living:
            segments -= other.segments
        segments -= mapped_by_others(segments, member.marker) if segments else set()
        return left + [f"segment {name}" for name in sorted(segments)]

    def entries_of(self, member: Member) -> list[str]:
        """Return a worker's entries in etcd.

        :raises OSError: etcd does not answer.
        """
        assert self.etcd is not None
        instance = instance_of(member.worker.log)
        return [key for key in self.etcd.entries() if instance in key] if instance else []

    def segments_left(self) -> Iterator[str]:
        """Yield what is new in /dev/shm, and no other program uses."""
        new = shared_memory() - self.segments_before
        yield from sorted(new - mapped_by_others(new, self._run) if new else new)


def abilities() -> set[str]:
    """Return what this machine can do, see ``Row.needs``."""
    return {name for name in ("pids", "tmp") if possible(name)} | ({"nats"} if Nats.installed() else set())


def places(engines: Sequence[Engine], workers: int) -> list[Place]:
    """Return the places of a fleet.

    :param workers: of each engine.
    """
    return [
        Place(f"{engine.name}-{number}", engine.model.name, tuple(engine.processes))
        for engine in engines
        for number in range(workers)
    ]


def frontend_names(count: int) -> list[str]:
    """Return the names of a fleet's frontends."""
    return [f"frontend-{number}" for number in range(count)]


def instance_of(log: str) -> str:
    """Return the instance id from a worker's log; empty if it has not served."""
    found = re.search(r"Worker ready .*instance=([0-9a-f]+)", log)
    return found[1] if found else ""
