"""Frontends and workers under measurement: one private discovery directory, started and ended together."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.discovery import DiscoveryWatch, FrontendModels
from common.processes import (
    Program,
    become_subreaper,
    command_line,
    descendants,
    end_all,
    loopback_environment,
    raise_file_limit,
    reap_orphans,
)
from common.subjects import BEFORE, OURS, Echo, Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

_PROGRAMS = Path(__file__).parent.parent / "workers"


class WorkbenchError(Exception):
    """Something that is to be measured did not start or did not answer."""


@dataclass
class Worker:
    """A worker under measurement.

    :param kind: `peer`, `bare`, `ours` or `before`.
    :param program: the process that was started; the supervisor of a dynamo-worker.
    :param model: the model it serves.
    :param instance: its id in discovery.
    :param temporary: its private TMPDIR.
    """

    kind: str
    program: Program
    model: str
    instance: str
    temporary: Path

    def serving_pid(self) -> int:
        """Return the pid of the process that serves requests."""
        if self.kind in (OURS, BEFORE):
            for pid in descendants(self.program.pid):
                if "--no-supervise" in command_line(pid):
                    return pid
            raise WorkbenchError(f"{self.program.name} has no worker process")
        return self.program.pid

    def supervisor_pids(self) -> list[int]:
        """Return the pids of the supervisor and its guardian; empty where there are none."""
        if self.kind not in (OURS, BEFORE):
            return []
        serving = self.serving_pid()
        above = [pid for pid in descendants(self.program.pid) if serving in descendants(pid)]
        return [self.program.pid, *above]

    def engine_pids(self) -> list[int]:
        """Return the pids of the engine's own processes, parents first, without resource trackers."""
        return [
            pid
            for pid in descendants(self.serving_pid())
            if not any("resource_tracker" in argument for argument in command_line(pid))
        ]


class Workbench:
    """Frontends and workers; a context manager that ends everything it has started.

    :param subject: what runs behind the workers.
    :param keep_logs: directory in which the logs are kept; they are thrown away when None.
    :param frontends: how many frontends to start.
    """

    def __init__(self, subject: Subject | None = None, keep_logs: Path | None = None, frontends: int = 1) -> None:
        self.subject = subject or Echo()
        self._keep_logs = keep_logs
        self._wanted_frontends = frontends
        self._numbers = itertools.count(1)
        self._programs: list[Program] = []
        self.frontends: list[Program] = []
        self.ports: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        become_subreaper()
        raise_file_limit()
        self.directory = Path(tempfile.mkdtemp(prefix="dwb-"))
        try:
            self._set_up()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tear_down()

    @property
    def port(self) -> int:
        """The HTTP port of the first frontend."""
        return self.ports[0]

    def environment(self, temporary: Path | None = None, additions: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a program in this workbench."""
        own = temporary or self.directory / "t"
        return loopback_environment(self.directory / "kv", own, **dict(additions or {}))

    def start(
        self,
        kind: str,
        model: str,
        flags: Sequence[str] = (),
        additions: Mapping[str, str] | None = None,
    ) -> Worker:
        """Start a worker and wait until it is registered and the frontends offer its model.

        :param kind: `peer`, `bare`, `ours` or `before`.
        :param model: name of the model; workers of one kind with the same model serve it together.
        :param flags: further flags.
        :param additions: further environment variables.
        :raises WorkbenchError: it ended or is not registered in time.
        """
        before = set(self.discovery.instances(model))
        program, temporary = self.launch(kind, model, flags, additions)
        deadline = time.monotonic() + self.subject.start_seconds
        while not (new := set(self.discovery.instances(model)) - before):
            if not program.running or time.monotonic() > deadline:
                what = "is not registered" if program.running else f"ended with code {program.code}"
                raise WorkbenchError(f"{program.name} {what}; its log ends:\n{program.log_tail()}")
            time.sleep(0.005)
        for port in self.ports:
            models = FrontendModels(port)
            if models.wait(model, True, deadline - time.monotonic()) is None:
                raise WorkbenchError(f"the frontend does not offer {model}")
            models.close()
        return Worker(kind, program, model, new.pop(), temporary)

    def launch(
        self,
        kind: str,
        model: str,
        flags: Sequence[str] = (),
        additions: Mapping[str, str] | None = None,
    ) -> tuple[Program, Path]:
        """Start a worker and return at once, with the directory that is its TMPDIR."""
        name = f"{kind}-{next(self._numbers)}"
        temporary = self.directory / name
        temporary.mkdir()
        command = self.subject.command(kind, self._model, model, model, flags)
        environment = self.environment(temporary, {**self.subject.environment(kind), **(additions or {})})
        program = Program(name, command, environment, self._logs / f"{name}.log")
        self._programs.append(program)
        return program, temporary

    def orphans(self) -> list[int]:
        """Return processes that outlived the program that started them."""
        running = {program.pid for program in [*self._programs, *self.frontends] if program.running}
        running |= {pid for pid in descendants(os.getpid()) if any("load.py" in part for part in command_line(pid))}
        return reap_orphans(running)

    def end(self, workers: Iterable[Worker]) -> None:
        """Kill workers with all their processes, and orphans; remove what nobody can remove who is killed like this."""
        for worker in workers:
            self._end(worker.program)
            if worker.instance:
                self.discovery.withdraw(worker.instance)
            if worker.program in self._programs:
                self._programs.remove(worker.program)
        end_all(self.orphans())

    @staticmethod
    def _end(program: Program) -> None:
        tree = program.tree()
        segments = shared_memory_of(tree)
        end_all(tree)
        program.wait(5.0)
        remove(segments)

    def _set_up(self) -> None:
        for name in ("kv", "t", "logs"):
            (self.directory / name).mkdir()
        self._logs = self._keep_logs or self.directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._model = self.subject.model_directory(self.directory)
        self.discovery = DiscoveryWatch(self.directory / "kv")
        self._start_frontends()

    def _start_frontends(self) -> None:
        self.frontends = []
        ports = free_ports(self._wanted_frontends)
        for number, port in enumerate(ports):
            command = [sys.executable, str(_PROGRAMS / "frontend.py"), str(port)]
            log = self._logs / f"frontend-{number + 1}.log"
            self.frontends.append(Program(f"frontend-{number + 1}", command, self.environment(), log))
        self.ports = tuple(ports)
        for program, port in zip(self.frontends, ports, strict=True):
            wait_listening(program, port)

    def _tear_down(self) -> None:
        for program in [*self._programs, *self.frontends]:
            self._end(program)
        with contextlib.suppress(OSError):
            end_all(self.orphans())
        if hasattr(self, "discovery"):
            self.discovery.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return different TCP ports that are free now on the loopback interface, below 32768 as the runtime wants them."""
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise WorkbenchError("no free port")


def wait_listening(program: Program, port: int, timeout: float = 30.0) -> None:
    """Wait until a program accepts connections.

    :raises WorkbenchError: it ended or does not listen in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if not program.running or time.monotonic() > deadline:
            raise WorkbenchError(f"{program.name} does not listen; its log ends:\n{program.log_tail()}")
        time.sleep(0.005)


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Return the files in /dev/shm that these processes have mapped.

    They are told by their inodes: a semaphore is mapped under a name that it had only while it was made.
    """
    mapped: set[int] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        mapped |= {int(line.split(maxsplit=5)[4]) for line in lines if "/dev/shm/" in line}
    with os.scandir("/dev/shm") as entries:
        return {entry.path for entry in entries if entry.inode() in mapped}


def remove(paths: Iterable[str]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        with contextlib.suppress(OSError):
            Path(path).unlink()


def files_below(directory: Path) -> list[str]:
    """Return all files and sockets below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
