"""A toy in the place of a server: `/health`, and `/v1/completions` that answers in capital letters.

It does as `vllm serve` does: a prompt may be a list of token ids, and with `return_token_ids` the answer has them too.
Run as `python -m dynamo_worker_acme.toy_server PORT TOKENS_PER_SECOND`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Of the tokenizer in `model/`: the mark between prompt and answer in the chat template, the end of an answer, and the
#: first of 256 tokens that each stand for a byte.
ANSWER_TOKEN, END_TOKEN, FIRST_BYTE_TOKEN = 0, 1, 3
#: Seconds of a token whose rate is not limited.
_SHORTEST_STEP = 0.001


def answer(prompt: list[int], parameters: dict[str, Any]) -> Iterator[tuple[int, str | None]]:
    """Yield each token of an answer, the last one with its finish reason.

    A request that moves here from another worker has the first part of its answer behind the mark, and goes on there. A
    real model does so by itself.
    """
    text, before = prompt, 0
    if ANSWER_TOKEN in prompt:
        mark = len(prompt) - 1 - prompt[::-1].index(ANSWER_TOKEN)
        text, before = prompt[:mark], len(prompt) - mark - 1
    stops = [*parameters.get("stop_token_ids", ()), *([] if parameters.get("ignore_eos") else [END_TOKEN])]
    for made in range(1, parameters["max_tokens"] + 1):
        at = (before + made - 1) % (len(text) + 1)
        token = END_TOKEN if at == len(text) else _capital(text[at])
        if token in stops and made >= parameters.get("min_tokens", 0):
            yield token, "stop"
            return
        yield token, "length" if made == parameters["max_tokens"] else None


def _capital(token: int) -> int:
    byte = token - FIRST_BYTE_TOKEN
    return token - 32 if ord("a") <= byte <= ord("z") else token


class _Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own."""

    step_seconds = _SHORTEST_STEP

    def do_GET(self) -> None:
        """Answer `/health`."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        """Stream the tokens of an answer, until the client closes the connection."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for token, reason in answer(request["prompt"], request):
            time.sleep(self.step_seconds)
            choice = {"index": 0, "token_ids": [token], "finish_reason": reason}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def handle(self) -> None:
        """Serve the connection; one that the client closes is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Say nothing: the worker logs."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024


def main() -> None:
    """Serve until the process is ended."""
    port, tokens_per_second = int(sys.argv[1]), float(sys.argv[2])
    if tokens_per_second:
        _Handler.step_seconds = 1 / tokens_per_second
    _Server(("127.0.0.1", port), _Handler).serve_forever()


if __name__ == "__main__":
    main()
