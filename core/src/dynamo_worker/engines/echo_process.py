"""The processes of the echo engine's process tree: a core that schedules, a rank that computes.

They need the standard library only, to start within a tenth of a second. Like the core of a big engine, this one runs
in its own session, owns a shared-memory segment (and thus a ``multiprocessing`` resource tracker), and keeps files in
the temporary directory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import shared_memory
from typing import Any

from dynamo_worker.kit.child_loop import StepEngine
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


class Core(StepEngine):
    """Gives every active request one token a step; a step takes as long as the rate asks for."""

    _rank: subprocess.Popen[bytes] | None = None
    _segment: shared_memory.SharedMemory | None = None
    _scratch = ""

    def start(self, options: Any) -> Any:
        """Start the rank, and create the segment and the file."""
        rate = options["tokens_per_second"]
        self._step_seconds = max(_SHORTEST_STEP, 1.0 / rate if rate else 0.0)
        self._due = 0.0
        self._steps = 0
        self._remaining: dict[str, int] = {}
        self._segment = shared_memory.SharedMemory(create=True, size=SEGMENT_SIZE)
        scratch, self._scratch = tempfile.mkstemp(prefix="echo-", dir=options["private_dir"])
        os.close(scratch)
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [*python_command("dynamo_worker.engines.echo_process"), "rank", str(theirs.fileno())]
            self._rank = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return {"rank_pid": self._rank.pid}

    def add(self, request_id: str, payload: Any) -> None:
        """Begin with a request; the payload is its number of tokens."""
        if not self._remaining:
            self._due = time.monotonic()
        self._remaining[request_id] = payload

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        self._remaining.pop(request_id, None)

    def step(self) -> float:
        """Let the rank compute, and send how many tokens each request gets and whether they are its last."""
        # A stopped rank stalls the engine, a dead one ends it.
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(b"s")
            if self._socket.recv(1):
                self._count_step()
                self._due = max(self._due + self._step_seconds, time.monotonic())
                return max(0.0, self._due - time.monotonic())
        raise SystemExit("the rank is gone")

    def _count_step(self) -> None:
        self._steps += 1
        assert self._segment is not None
        assert self._segment.buf is not None
        self._segment.buf[:8] = self._steps.to_bytes(8, "little")
        for request_id, count in list(self._remaining.items()):
            last = count <= 1
            self.send(request_id, (min(1, count), last), last=last)
            if last:
                del self._remaining[request_id]
            else:
                self._remaining[request_id] = count - 1

    def close(self) -> None:
        """End the rank, and remove the segment and the file."""
        if self._rank is not None:
            self._socket.close()
            try:
                self._rank.wait(_RANK_SECONDS)
            except subprocess.TimeoutExpired:  # it is stopped
                self._rank.kill()
                self._rank.wait()
        if self._segment is not None:
            self._segment.unlink()
            with contextlib.suppress(BufferError):  # the signal came while the segment was written to
                self._segment.close()
        if self._scratch:
            os.unlink(self._scratch)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]))
