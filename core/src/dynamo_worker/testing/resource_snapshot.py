"""What an engine leaves in this process and below it: processes, threads, descriptors, segments and files.

Only what is certainly the engine's counts: other programs of the machine make segments and files too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_worker.kit.blocking import LastingThread
from dynamo_worker.supervisor import linux
from dynamo_worker.testing.leftovers import MARKER, marked_processes

_SEGMENTS = "/dev/shm/"  # noqa: S108 - where the kernel keeps them
#: Directories that all programs share.
_SHARED_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108
#: Signals that belong to the worker.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def descendants() -> dict[int, str]:
    """Return the pids and command lines of all running descendants of this process."""
    parents: dict[int, list[int]] = {}
    for pid in linux.all_pids():
        stat = linux.read_stat(pid)
        if stat is not None and not stat.ended:
            parents.setdefault(stat.parent, []).append(pid)
    found: dict[int, str] = {}
    waiting = [os.getpid()]
    while waiting:
        for child in parents.get(waiting.pop(), ()):
            found[child] = _command(child)
            waiting.append(child)
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _descriptors(pid: int) -> dict[int, str]:
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found[int(entry)] = os.readlink(f"/proc/{pid}/fd/{entry}")
    return found


def _mapped(pid: int) -> set[str]:
    with (
        contextlib.suppress(OSError, IndexError),
        open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file,
    ):
        return {line.split(maxsplit=5)[5].strip() for line in file if _SEGMENTS in line}
    return set()


def _described(target: str) -> str:
    """Return the target of a descriptor; for a socket with its line in the kernel's tables."""
    inode = target.removeprefix("socket:[").removesuffix("]")
    for kind in ("unix", "tcp", "tcp6", "udp") if inode != target else ():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{kind}").read_text().splitlines():
                if inode in line.split():
                    return f"{target} ({kind}: {' '.join(line.split())[:80]})"
    return target


@dataclass
class Snapshot:
    """What exists now.

    :param processes: command lines of descendants by pid; a process that has detached is found by its marker.
    :param threads: names of Python's threads by ident, but for those of the kit that stay on purpose.
    :param descriptors: targets of this process's descriptors.
    :param shared: files in shared directories that this process or a descendant has open or maps.
    :param signals: the handlers of signals that belong to the worker.
    :param directory: the current directory.
    """

    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[int, str] = field(default_factory=dict)
    descriptors: dict[int, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    signals: dict[signal.Signals, object] = field(default_factory=dict)
    directory: str = ""

    @classmethod
    def take(cls, private: str = "\0") -> Snapshot:
        """Return what exists now.

        :param private: files below this directory do not count.
        """
        processes = descendants()
        if MARKER in os.environ:
            processes |= marked_processes(os.environ[MARKER])
        own = _descriptors(os.getpid())
        used = set(own.values()) | _mapped(os.getpid())
        for pid in processes:
            used |= set(_descriptors(pid).values()) | _mapped(pid)
        shared = {path for path in used if path.startswith(_SHARED_DIRECTORIES) and not path.startswith(private)}
        return cls(
            processes,
            {t.ident or 0: t.name for t in threading.enumerate() if not isinstance(t, LastingThread)},
            own,
            {path for path in shared if os.path.exists(path)},
            {number: signal.getsignal(number) for number in _SIGNALS},
            os.getcwd(),
        )

    def new_descriptors(self, before: Snapshot, *, sockets: bool) -> list[str]:
        """Return the targets of descriptors that were not there before.

        :param sockets: sockets, or everything else.
        """
        new = [target for number, target in self.descriptors.items() if before.descriptors.get(number) != target]
        return [_described(target) for target in new if target.startswith("socket:") == sockets]
