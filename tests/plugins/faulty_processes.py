"""The processes of the faulty engine: a core that waits for a rank, and a rank that does what a request asks for.

``python faulty_processes.py core|rank DESCRIPTOR …``; each request and each answer is one line.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def work(seconds: float) -> None:
    """Use CPU time, as a compiler inside the process does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def compile_kernels(seconds: float) -> None:
    """Wait for a compiler in a process of its own, which waits for a disk."""
    with tempfile.TemporaryDirectory() as directory:
        compiler = Path(directory) / "cc1plus"
        shutil.copy(str(shutil.which("sleep")), compiler)
        subprocess.run([compiler, str(seconds)], check=True)


def dead_lock(_: float) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


#: By the word that asks for it; each takes a number of seconds.
FAULTS = {"work": work, "compile": compile_kernels, "deadlock": dead_lock, "sleep": time.sleep}


def run_rank(core: socket.socket) -> None:
    for line in core.makefile():
        word, _, seconds = line.strip().partition(" ")
        if word in FAULTS:
            FAULTS[word](float(seconds or 0))
        core.sendall(b"done\n")


def run_core(worker: socket.socket, waiting: str) -> None:
    """Pass every request on to the rank, and wait for its answer: asleep, or in a busy loop."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, "rank", str(theirs.fileno())]
        rank = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    worker.sendall(f"{rank.pid}\n".encode())
    for line in worker.makefile():
        ours.sendall(line.encode())
        while waiting == "spin" and not select.select([ours], [], [], 0)[0]:
            os.sched_yield()
        answer = ours.recv(64)
        if not answer:
            return
        worker.sendall(answer)


if __name__ == "__main__":
    role, descriptor, *rest = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as connection:
        if role == "core":
            run_core(connection, *rest)
        else:
            run_rank(connection)
