"""An OpenAI-compatible server for `server.py`: sends so many tokens a second for each stream, at no other cost."""

from __future__ import annotations

import argparse
import asyncio
import json

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_MODELS = json.dumps({"object": "list", "data": [{"id": "tokens"}]}).encode()


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(text: str, reason: str | None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}
    head = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk", "created": 1795878366}
    return _chunked(b"data: " + json.dumps({**head, "model": "tokens", "choices": [choice]}).encode() + b"\n\n")


_TOKEN, _LAST, _END = _event(" word", None), _event("", "length"), _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        if not head.startswith("post"):
            answer = _MODELS if "/v1/models" in head else b"{}"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
            return
        request = json.loads(body)
        pause = 1 / request["temperature"] if request.get("temperature") else 0.0  # tokens a second
        loop = asyncio.get_running_loop()
        writer.write(_HEAD)
        due = loop.time()
        for _ in range(request["max_tokens"]):
            writer.write(_TOKEN)
            due += pause
            if pause:
                await asyncio.sleep(max(0.0, due - loop.time()))
        writer.write(_LAST + _END)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    server = await asyncio.start_server(_serve, "127.0.0.1", args.port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main())
