"""The engine itself, in a separate process: it reverses prompts, one token of every request per step.

It knows nothing of Dynamo: it reads JSON lines from a socket and writes JSON lines to it. A real engine would be in
this place with its scheduler, its ranks and its GPU. Standard library only: it starts in a tenth of a second.

Run as ``python -m dynamo_worker_reverse.core DESCRIPTOR TOKENS_PER_SECOND USAGE_FILE``; the adapter starts it.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

#: Ids of the tokenizer in ``model/``: three special tokens, then one token for each byte.
FIRST_BYTE_TOKEN = 3
#: Shortest step when the rate is not limited, in seconds.
_SHORTEST_STEP = 0.001


def reverse(tokens: list[int]) -> list[int]:
    """Return the tokens of the text read backwards, character by character (not byte by byte)."""
    text = bytes(token - FIRST_BYTE_TOKEN for token in tokens if token >= FIRST_BYTE_TOKEN)
    return [byte + FIRST_BYTE_TOKEN for byte in text.decode("utf-8", "replace")[::-1].encode()]


class Core:
    """Requests in progress, and what they have used since the last flush."""

    def __init__(self, adapter: socket.socket, tokens_per_second: float, usage_file: Path | None) -> None:
        self._adapter = adapter
        self._step_seconds = max(_SHORTEST_STEP, 1.0 / tokens_per_second if tokens_per_second else 0.0)
        self._usage_file = usage_file
        self._usage: dict[str, int] = {}
        #: The tokens that are still to be sent, for each request; the next one last.
        self._remaining: dict[str, list[int]] = {}

    def run(self) -> None:
        """Serve until the adapter closes its end."""
        self._send({"op": "ready"})
        buffer = b""
        due = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._adapter, selectors.EVENT_READ)
            while True:
                if selector.select(max(0.0, due - time.monotonic()) if self._remaining else None):
                    data = self._adapter.recv(65536)
                    if not data:
                        return
                    *lines, buffer = (buffer + data).split(b"\n")
                    for line in lines:
                        self._handle(json.loads(line))
                if self._remaining and time.monotonic() >= due:
                    self._step()
                    due = time.monotonic() + self._step_seconds

    def flush(self) -> None:
        """Append what was used since the last flush to the usage file."""
        usage, self._usage = self._usage, {}
        if self._usage_file is not None and usage:
            with self._usage_file.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps({'request': name, 'tokens': count})}\n" for name, count in usage.items())

    def _handle(self, message: dict[str, Any]) -> None:
        operation = message["op"]
        if operation == "add":
            answer = reverse(message["tokens"])
            start, count = message["start"], message["count"]
            if count is None:
                count = max(0, len(answer) - start)
            tokens = [answer[(start + index) % len(answer)] for index in range(count)]
            self._remaining[message["id"]] = tokens[::-1]
        elif operation == "abort":
            self._remaining.pop(message["id"], None)
        elif operation == "flush":
            self.flush()
            self._send({"op": "flushed"})
        elif operation == "ping":
            self._send({"op": "pong"})

    def _step(self) -> None:
        """Give every request its next token."""
        tokens = {name: remaining.pop() for name, remaining in self._remaining.items() if remaining}
        done = [name for name, remaining in self._remaining.items() if not remaining]
        for name in tokens:
            self._usage[name] = self._usage.get(name, 0) + 1
        for name in done:
            del self._remaining[name]
        self._send({"op": "step", "tokens": tokens, "done": done})

    def _send(self, message: dict[str, Any]) -> None:
        self._adapter.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Serve one adapter until it is gone or SIGTERM arrives."""
    descriptor, tokens_per_second, usage_file = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(fileno=int(descriptor)) as adapter:
        core = Core(adapter, float(tokens_per_second), Path(usage_file) if usage_file else None)
        try:
            core.run()
        except ConnectionError:
            pass  # the adapter died; so do we
        finally:
            core.flush()


if __name__ == "__main__":
    main()
