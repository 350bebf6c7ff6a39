"""The engine itself, in a separate process: it reverses prompts, one token of every request per step.

It knows nothing of Dynamo. A real engine would be in this place with its scheduler, its ranks and its GPU. Standard
library only: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamo_worker.kit.child_loop import StepEngine

#: Ids of the tokenizer in ``model/``: three special tokens, then one token for each byte.
FIRST_BYTE_TOKEN = 3
#: Shortest step when the rate is not limited, in seconds.
_SHORTEST_STEP = 0.001


def reverse(tokens: list[int]) -> list[int]:
    """Return the tokens of the text read backwards, character by character (not byte by byte)."""
    text = bytes(token - FIRST_BYTE_TOKEN for token in tokens if token >= FIRST_BYTE_TOKEN)
    return [byte + FIRST_BYTE_TOKEN for byte in text.decode("utf-8", "replace")[::-1].encode()]


class Core(StepEngine):
    """Requests in progress, and what they have used since the last flush."""

    def start(self, options: Any) -> None:
        """Take the options; there is no model to load."""
        rate = options["tokens_per_second"]
        self._step_seconds = max(_SHORTEST_STEP, 1.0 / rate if rate else 0.0)
        self._usage_file = Path(options["usage_file"]) if options["usage_file"] else None
        self._usage: dict[str, int] = {}
        #: The tokens that are still to be sent, for each request; the next one last.
        self._remaining: dict[str, list[int]] = {}

    def add(self, request_id: str, payload: Any) -> None:
        """Begin with a request."""
        answer = reverse(payload["tokens"])
        start, count = payload["start"], payload["count"]
        if count is None:
            count = max(0, len(answer) - start)
        self._remaining[request_id] = [answer[(start + index) % len(answer)] for index in range(count)][::-1]

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._remaining.pop(request_id, None)

    def step(self) -> float:
        """Give every request its next token."""
        for name, remaining in list(self._remaining.items()):
            if remaining:
                self._usage[name] = self._usage.get(name, 0) + 1
            tokens = [remaining.pop()] if remaining else []
            last = not remaining
            self.send(name, (tokens, last), last=last)
            if last:
                del self._remaining[name]
        return self._step_seconds

    def answer(self, question: str, payload: Any) -> Any:
        """Write the usage records, if that is what the adapter asks for."""
        return self.flush() if question == "flush" else super().answer(question, payload)

    def flush(self) -> None:
        """Append what was used since the last flush to the usage file."""
        usage, self._usage = self._usage, {}
        if self._usage_file is not None and usage:
            with self._usage_file.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps({'request': name, 'tokens': count})}\n" for name, count in usage.items())

    def close(self) -> None:
        """Lose no usage records."""
        self.flush()
