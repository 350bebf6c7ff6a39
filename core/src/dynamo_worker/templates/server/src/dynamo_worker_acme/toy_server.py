"""A toy in the place of a server: `/health`, and OpenAI's two APIs, which it answers in capital letters.

Each character is a token. Run as `python -m dynamo_worker_acme.toy_server PORT TOKENS_PER_SECOND`.
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

#: Longest sequence in tokens, prompt and answer together.
CONTEXT_LENGTH = 131_072
#: Seconds of a token whose rate is not limited.
_SHORTEST_STEP = 0.001


def prompt_of(request: dict[str, Any]) -> str:
    """Return the text of a request's prompt: of a chat the last message.

    :raises ValueError: it has none, or one that is too long.
    """
    content = request["messages"][-1].get("content") if "messages" in request else request["prompt"]
    if isinstance(content, list):  # parts, as for images
        content = "".join(part["text"] if part.get("type") == "text" else "\0" for part in content)
    if not isinstance(content, str) or not content or "\0" in content:
        raise ValueError("the prompt must be a text that is not empty")
    if len(content) + request.get("max_tokens", 1) > CONTEXT_LENGTH:
        raise ValueError(f"prompt and answer may have {CONTEXT_LENGTH} tokens")
    return content


def answer(prompt: str, request: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield each token of an answer, and an empty one at its end with the finish reason.

    With `max_tokens` it goes on up to that length, as most models would.
    """
    text, reason = prompt.upper(), "stop"
    if "max_tokens" in request:
        length = request["max_tokens"]
        text, reason = (text * (length // len(text) + 1))[:length], "length"
    for string in request.get("stop", ()):
        if string in text:
            text, reason = text.partition(string)[0], "stop"
    for character in text:
        yield character, None
    yield "", reason


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
        try:
            prompt = prompt_of(request)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": f"messages or prompt: {error}"}}).encode())
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        chat = "messages" in request
        head = {"id": f"toy-{time.monotonic_ns()}", "created": int(time.time()), "model": request["model"]}
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        for token, reason in answer(prompt, request):
            time.sleep(self.step_seconds)
            new = {"delta": {"role": "assistant", "content": token}} if chat else {"text": token}
            self._send({**head, "choices": [{"index": 0, "finish_reason": reason, **new}]})
        if request.get("stream_options", {}).get("include_usage"):
            made = sum(len(token) for token, _ in answer(prompt, request))
            counts = {"prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made}
            self._send({**head, "choices": [], "usage": counts})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

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
