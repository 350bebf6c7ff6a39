"""Asks a worker whether it lives, again and again until its input ends, and writes how long each answer took.

A process of its own: in the test's, it would wait for whatever the test does. The arguments are a port and the worker's
pid. Of each answer it writes two times, in seconds: how long it took, and how much of that the worker's event loop and
this process were ready to run and had no core, because the machine has other work.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time

#: Seconds from one look to the next, and after which an answer is given up.
_EVERY, _LIMIT = 0.01, 20.0


def waited(pid: int) -> float:
    """Return how long the main thread of a process has waited for a core until now."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0


def answer(port: int) -> bytes:
    """Return all that the status server answers."""
    with socket.create_connection(("127.0.0.1", port), _LIMIT) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        parts = []
        while part := connection.recv(4096):
            parts.append(part)
        return b"".join(parts)


def look(port: int, pid: int, own: int) -> tuple[float, float, str]:
    """Ask once; return how long that took, for how much of it there was no core, and what went wrong."""
    before, began = waited(pid) + waited(own), time.monotonic()
    try:
        head = answer(port)
    except OSError as error:
        wrong = str(error) or type(error).__name__
    else:
        wrong = "" if head.startswith(b"HTTP/1.1 200 ") else repr(head[:40])
    return time.monotonic() - began, waited(pid) + waited(own) - before, wrong


def main(port: int, pid: int) -> None:
    own = os.getpid()
    looks = [look(port, pid, own)]
    print(flush=True)  # the first look has been taken
    while not select.select([sys.stdin], [], [], _EVERY)[0]:
        looks.append(look(port, pid, own))
    json.dump(looks, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
