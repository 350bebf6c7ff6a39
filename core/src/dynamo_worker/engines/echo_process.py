"""The processes of the echo engine's process tree: a core that schedules, a rank that computes.

They use the standard library only, to start within a tenth of a second. Like the core of a big engine, this one runs in
its own session, owns a shared-memory segment (and thus a ``multiprocessing`` resource tracker), and keeps files in the
temporary directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import shared_memory

from dynamo_worker.kit.python_command import python_command

#: Bytes of the segment through which core and rank count their steps.
SEGMENT_SIZE = 4096
#: Seconds that the rank gets to end after its core has closed the connection.
_RANK_SECONDS = 0.5
#: Shortest step in seconds, when the rate is not limited.
_SHORTEST_STEP = 0.001


def run_rank(descriptor: int) -> None:
    """Answer every step of the core until it is gone."""
    with socket.socket(fileno=descriptor) as core, contextlib.suppress(ConnectionError):
        while step := core.recv(1):
            core.sendall(step)


def run_core(descriptor: int, tokens_per_second: float, private_dir: str) -> None:
    """Serve the worker at ``descriptor`` until it is gone or SIGTERM arrives."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = socket.socket(fileno=descriptor)
    ours, theirs = socket.socketpair()
    segment = shared_memory.SharedMemory(create=True, size=SEGMENT_SIZE)
    scratch, scratch_path = tempfile.mkstemp(prefix="echo-", dir=private_dir)
    with theirs:
        rank = subprocess.Popen(
            [*python_command("dynamo_worker.engines.echo_process"), "rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
    try:
        with contextlib.suppress(ConnectionError):  # the worker or the rank is gone
            worker.sendall(json.dumps({"rank_pid": rank.pid}).encode() + b"\n")
            _schedule(worker, ours, segment, tokens_per_second)
    finally:
        ours.close()
        try:
            rank.wait(_RANK_SECONDS)
        except subprocess.TimeoutExpired:  # it is stopped
            rank.kill()
            rank.wait()
        segment.unlink()
        with contextlib.suppress(BufferError):  # the signal came while the segment was written to
            segment.close()
        os.close(scratch)
        os.unlink(scratch_path)


def _schedule(
    worker: socket.socket, rank: socket.socket, segment: shared_memory.SharedMemory, tokens_per_second: float
) -> None:
    """Give every active request one token a step; a step takes as long as the rate asks for."""
    step_seconds = max(_SHORTEST_STEP, 1.0 / tokens_per_second if tokens_per_second else 0.0)
    remaining: dict[str, int] = {}
    buffer = b""
    steps = 0
    assert segment.buf is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            timeout = max(0.0, due - time.monotonic()) if remaining else None
            if selector.select(timeout):
                data = worker.recv(65536)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if "add" in message:
                        if not remaining:
                            due = time.monotonic()
                        remaining[message["add"]] = message["count"]
                    else:
                        remaining.pop(message["abort"], None)
                continue
            # The rank computes the step; a stopped rank stalls the engine, a dead one ends it.
            rank.sendall(b"s")
            if not rank.recv(1):
                raise SystemExit("echo engine: the rank is gone")
            steps += 1
            segment.buf[:8] = steps.to_bytes(8, "little")
            tokens = {request_id: min(1, count) for request_id, count in remaining.items()}
            last = [request_id for request_id, count in remaining.items() if count <= 1]
            for request_id in last:
                del remaining[request_id]
            for request_id in remaining:
                remaining[request_id] -= 1
            worker.sendall(json.dumps({"tokens": tokens, "last": last}).encode() + b"\n")
            due = max(due + step_seconds, time.monotonic())


def main() -> None:
    """Run as ``python -m dynamo_worker.engines.echo_process core|rank DESCRIPTOR …``; started by the echo engine."""
    role, descriptor, *rest = sys.argv[1:]
    if role == "core":
        run_core(int(descriptor), float(rest[0]), rest[1])
    else:
        run_rank(int(descriptor))


if __name__ == "__main__":
    main()
