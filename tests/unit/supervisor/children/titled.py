"""Names itself as setproctitle does: over the memory of its arguments and environment, which is what /proc shows.

Writes its pid to ``$TITLED_PIDS``. At SIGUSR1 it forks away into a session of its own. With ``$TITLED_UNMARKED`` it
takes the mark of its tree off, too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time

pids = os.environ["TITLED_PIDS"]


def write_pid() -> None:
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\n")


def run_away(*_: object) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    write_pid()


if "TITLED_UNMARKED" in os.environ:
    resource.setrlimit(15, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # RLIMIT_RTTIME
signal.signal(signal.SIGUSR1, run_away)
with open("/proc/self/stat") as file:
    fields = file.read().rpartition(")")[2].split()
title = b"VLLM::EngineCore"
start, end = int(fields[45]), int(fields[48])  # arg_start, env_end
ctypes.memset(start, 0, end - start)
ctypes.memmove(start, title, len(title))
with open("/proc/self/environ", "rb") as file:
    assert b"DYNAMO" not in file.read()
write_pid()
os.write(1, b"up\n")
while True:
    time.sleep(1000)
