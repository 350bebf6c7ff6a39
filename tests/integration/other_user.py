"""Does as another user what that one could do to a worker, and writes what succeeded.

Its input is a JSON object: `user`, the processes' `pids`, and `paths`, directories to look into. Its output is a list
of sentences, one for each thing that should not have been possible.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator

PTRACE_ATTACH, PTRACE_DETACH = 16, 17

succeeded: list[str] = []


def attempt(what: str, action: Callable[[], object]) -> None:
    """Do something that should fail."""
    with contextlib.suppress(OSError):
        result = action()
        succeeded.append(f"{what}: {str(result)[:200]}")


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(200)


def write(path: str, mode: str = "r+b") -> None:
    with open(path, mode):
        pass


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        client.connect(path)


def trace(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0)
    libc.ptrace(PTRACE_DETACH, pid, None, None)


def read_memory(pid: int) -> int:
    """Read a byte where the program itself begins, without asking ``/proc``'s files."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 1)
    remote = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 1)
    done: int = libc.process_vm_readv(pid, vector, 1, remote, 1, 0)
    if done < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return done


def descriptor_of(pid: int, number: int) -> int:
    """Take a descriptor out of a process (``pidfd_getfd``)."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken: int = libc.syscall(438, os.pidfd_open(pid), number, 0)
    if taken < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return taken


def against_process(pid: int) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT):
        attempt(f"{number.name} to {pid}", lambda number=number: os.kill(pid, number))
    attempt(f"trace {pid}", lambda: trace(pid))
    attempt(f"read the memory of {pid}", lambda: read_memory(pid))
    attempt(f"take a descriptor of {pid}", lambda: descriptor_of(pid, 1))
    for name in ("environ", "mem", "maps", "stack", "auxv", "io"):
        attempt(f"read {name} of {pid}", lambda name=name: read(f"/proc/{pid}/{name}"))
    for name in ("fd", "cwd", "root", "map_files", "ns"):
        attempt(f"list {name} of {pid}", lambda name=name: os.listdir(f"/proc/{pid}/{name}"))
    attempt(f"write oom_score_adj of {pid}", lambda: write(f"/proc/{pid}/oom_score_adj"))
    attempt(f"change the priority of {pid}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))


def below(path: str) -> Iterator[str]:
    """Return a path, and what lies below as far as it can be seen."""
    yield path
    for directory, directories, files in os.walk(path):
        yield from (os.path.join(directory, name) for name in directories + files)


def against_path(path: str) -> None:
    """Read, replace, write and remove a file or a directory."""
    for one in below(path):
        if os.path.isdir(one):
            attempt(f"list {one}", lambda one=one: os.listdir(one))
            attempt(f"write into {one}", lambda one=one: write(os.path.join(one, "planted"), "xb"))
        else:
            attempt(f"read {one}", lambda one=one: read(one))
            attempt(f"write {one}", lambda one=one: write(one))
            attempt(f"connect to {one}", lambda one=one: connect(one))
            attempt(f"remove {one}", lambda one=one: os.unlink(one))
        attempt(f"rename {one}", lambda one=one: os.rename(one, one + ".moved"))
        attempt(f"change the mode of {one}", lambda one=one: os.chmod(one, 0o777))
    attempt(f"link in place of {path}", lambda: os.symlink("/", path))


def against_sockets(inodes: set[str]) -> None:
    """Connect to the unix sockets of these processes, those without a file too."""
    with open("/proc/net/unix", encoding="ascii", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            if len(words) == 8 and words[6] in inodes:
                name = re.sub("^@", "\0", words[7])
                attempt(f"connect to socket {words[7]}", lambda name=name: connect(name))


def main() -> None:
    task = json.load(sys.stdin)
    os.setgroups([])
    os.setgid(task["user"])
    os.setuid(task["user"])
    os.chdir("/")
    for pid in task["pids"]:
        against_process(pid)
    for path in task["paths"]:
        against_path(path)
    against_sockets(set(task["sockets"]))
    json.dump(succeeded, sys.stdout)


if __name__ == "__main__":
    main()
