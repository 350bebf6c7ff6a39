"""An OpenAI-compatible server that fails on demand, in as many ways as real ones do. Standard library only.

The last word of a chat's prompt, such as ``fail:endless-line``, chooses what goes wrong with its answer; the flags
choose what goes wrong with the server. It counts what its clients do under ``/stats``.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import signal
import sys
import time

STATS: collections.Counter[str] = collections.Counter()
ALIVE: set[asyncio.Task[None]] = set()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--health", default="200", help="status of /health, `silent`, `garbage`, `large`, `html`")
    parser.add_argument("--models", default="fake", help="names, `none`, `404`, `302`, `garbage`, `silent`, `html`")
    parser.add_argument("--apis", default="chat,completions", help="the others are answered with 404")
    parser.add_argument("--broken", action="store_true", help="requests are answered with 500")
    parser.add_argument("--silent", action="store_true", help="requests are accepted and not answered")
    parser.add_argument("--pings", action="store_true", help="requests are answered with comments, for ever")
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--loading", type=float, default=0.0, help="seconds for which /health answers 503")
    parser.add_argument("--key", help="the API key that requests need")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two tokens")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--die-after", type=float, help="seconds until it ends by itself with code 3")
    parser.add_argument("--daemon", action="store_true", help="serve in a background process and end at once")
    parser.add_argument("--certificate", nargs=2, metavar=("CERT", "KEY"))
    parser.add_argument("--finish-reason", default="length")
    parser.add_argument("--bare", action="store_true", help="chunks have choices only")
    return parser.parse_args()


#: What a proxy or a login page in the server's place answers.
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 26\r\n\r\n<html><h1>Sign in</h1>    "

#: Events that are JSON and no chunk of OpenAI's.
SHAPES = {
    "null-choices": {"choices": None},
    "odd-choices": {"choices": [7]},
    "odd-reason": {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": {"why": "not"}}]},
    "no-choices": {"object": "chat.completion.chunk"},
}


class Server:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.stuck = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        ALIVE.add(task)
        try:
            first = await reader.readexactly(1)
            if not first.isalpha():  # TLS
                return writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *rest = head.split("\r\n")
            method, path, _ = line.split()
            headers = {name.lower(): value for name, _, value in (row.partition(": ") for row in rest)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if path.startswith("/v1/") and method == "POST":
                STATS["requests"] += 1
                STATS["running"] += 1
                try:
                    await self.complete(path, headers, json.loads(body), reader, writer)
                    STATS["completed"] += 1
                finally:
                    STATS["running"] -= 1
            else:
                await self.get(path, headers, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            STATS["broken"] += 1
        finally:
            ALIVE.discard(task)
            writer.close()
        return None

    async def get(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        args = self.args
        if path == "/stats":
            return self.answer(writer, 200, dict(STATS))
        if path == "/headers":
            return self.answer(writer, 200, headers)
        if args.key and path != "/health" and headers.get("authorization") != f"Bearer {args.key}":
            return self.answer(writer, 401, {"error": {"message": "wrong key"}})
        if path == "/health":
            if time.monotonic() - self.started < args.loading:
                return self.answer(writer, 503, {"error": {"message": "Loading model"}})
            if args.health == "silent":
                await asyncio.sleep(3600)
            if args.health == "garbage":
                return writer.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
            if args.health == "large":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                    await writer.drain()
            if args.health == "html":
                return writer.write(PAGE)
            return self.answer(writer, int(args.health), {})
        if path == "/v1/models":
            if args.models == "404":
                return self.answer(writer, 404, {"detail": "Not Found"})
            if args.models == "302":
                return self.answer(writer, 302, {}, "Location: http://evil/\r\n")
            if args.models == "garbage":
                return self.answer(writer, 200, "<html>")
            if args.models == "html":
                return writer.write(PAGE)
            if args.models == "silent":
                await asyncio.sleep(3600)
            names = [] if args.models == "none" else args.models.split(",")
            entries = [{"id": name, "object": "model", "max_model_len": args.context_length} for name in names]
            return self.answer(writer, 200, {"object": "list", "data": entries})
        return self.answer(writer, 404, {"detail": "Not Found"})

    @staticmethod
    def answer(writer: asyncio.StreamWriter, status: int, body: object, extra: str = "") -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    async def complete(
        self,
        path: str,
        headers: dict[str, str],
        request: dict,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self.args.key and headers.get("authorization") != f"Bearer {self.args.key}":
            return self.answer(writer, 401, {"error": {"message": "wrong key"}})
        if self.args.silent:
            await asyncio.sleep(3600)
        if self.args.pings:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            while True:
                writer.write(b": ping\n\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        if self.args.broken:
            return self.answer(writer, 500, {"error": {"message": "no kernel image"}})
        if ("chat" if "/chat/" in path else "completions") not in self.args.apis.split(","):
            return self.answer(writer, 404, {"detail": "Not Found"})
        STATS["model " + str(request.get("model"))] += 1
        prompt = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
        fault = prompt.split()[-1].partition("fail:")[2] if prompt.split() else ""
        if self.stuck or fault == "stuck":  # its health is fine
            self.stuck = True
            await asyncio.sleep(3600)
        if fault.startswith("status-"):
            status = int(fault[7:])
            return self.answer(
                writer, status, {"error": {"message": f"no: {status}", "code": status}}, "Location: http://evil/\r\n"
            )
        if fault == "detail":
            return self.answer(writer, 422, {"detail": [{"loc": ["body", "messages"], "msg": "wrong"}]})
        if fault == "html":
            return self.answer(writer, 500, "<html>" + "x" * 100_000)
        if fault == "long-error":
            return self.answer(writer, 400, {"error": {"message": "x" * 5_000_000}})
        if fault == "silent":
            await asyncio.sleep(3600)
        if fault == "no-stream" or not request.get("stream"):
            return self.answer(writer, 200, {"choices": []})
        if fault == "garbage-head":
            return writer.write(b"\x00\x01garbage\r\n\r\n" * 10)
        if fault == "endless-head":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X-Header: " + b"y" * 1000 + b"\r\n")
                await writer.drain()
        if fault == "compressed":
            return writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\nxxxx"
            )
        if fault == "upgrade":
            return writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nxxxx")
        if fault == "interim":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        chunked = not fault.startswith("unframed")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Connection: close\r\n\r\n")
        )

        async def send(data: bytes) -> None:
            writer.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            await writer.drain()

        chat = path.endswith("chat/completions")

        def event(index: int, text: str, reason: str | None = None) -> bytes:
            choice = {"index": 0, "finish_reason": reason, **({"delta": {"content": text}} if chat else {"text": text})}
            chunk = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk" if chat else "text_completion",
                "created": 1,
                "model": request.get("model"),
                "choices": [choice],
            }
            if self.args.bare:
                chunk = {"choices": [choice]}
            return b"data: " + json.dumps(chunk).encode() + b"\n\n"

        gone = asyncio.ensure_future(reader.read(1))  # ends when the client closes the connection
        try:
            count = request.get("max_tokens") or 16
            words = prompt.split() or ["."]
            pause = self.args.pause
            if fault == "bytewise":
                for byte in b"".join(event(index, words[index % len(words)] + " ") for index in range(count)):
                    await send(bytes([byte]))
                count = 0
            for index in range(count):
                if index == count // 2 and fault and await self.middle(fault, send, writer):
                    return None
                if gone.done():
                    STATS["stopped"] += 1
                    return None
                data = event(index, words[index % len(words)] + " ")
                await send(data.replace(b"\n", b"\r\n") if fault == "crlf" else data)
                STATS["tokens"] += 1
                if pause or not index % 100:
                    await asyncio.sleep(pause)
            if fault == "clean-no-end":
                writer.write(b"0\r\n\r\n")
            if fault.endswith("no-end"):
                return None
            await send(event(count, "", self.args.finish_reason))
            if fault != "no-done":
                await send(b"data: [DONE]\n\n")
            if fault == "goes-on":
                while True:
                    await send(event(0, "more"))
            if chunked:
                writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            gone.cancel()
        return None

    async def middle(self, fault: str, send, writer: asyncio.StreamWriter) -> bool:
        """Do in the middle of an answer what a fault means; return whether that was its end."""
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exit":
            print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
            os._exit(1)
        if fault == "reset":
            writer.transport.abort()
            return True
        if fault == "cut":
            return True
        if fault == "garbage":
            await send(b"data: {nonsense\n\n")
        if fault == "deep":
            await send(b"data: " + b"[" * 100_000 + b"\n\n")
        if fault == "array":
            await send(b"data: [1, 2]\n\n")
        if fault == "error":
            await send(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')
        if fault == "old-error":
            await send(b'error: {"message": "out of memory", "code": 500}\n\n')
        if fault == "comments":
            await send(b": ping\n\nid: 7\nretry: 10\n\n")
        if fault == "endless-line":
            while True:
                await send(b"data: " + b"x" * 50_000)
        if fault == "trickled-line":
            for _ in range(30_000):
                await send(b"x")
            await send(b"\n\n")
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in SHAPES:
            await send(b"data: " + json.dumps(SHAPES[fault]).encode() + b"\n\n")
        if fault == "surrogate":
            await send(b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud800"}, "finish_reason": null}]}\n\n')
        if fault == "huge-chunk":
            writer.write(b"f" * 17 + b"\r\n")
            await writer.drain()
            return True
        if fault == "endless-trailer":
            writer.write(b"0\r\nX-Trailer: ")
            while True:
                writer.write(b"x" * 50_000)
                await writer.drain()
        if fault == "bad-chunk":
            writer.write(b"nonsense\r\n")
            await writer.drain()
            return True
        return False


async def main() -> None:
    args = options()
    if args.daemon and os.fork():
        os._exit(0)
    if args.daemon:
        os.setsid()
    if args.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
    if args.die_after is not None:
        print("error: the model cannot be loaded", file=sys.stderr, flush=True)
        await asyncio.sleep(args.die_after)
        os._exit(3)
    tls = None
    if args.certificate:
        import ssl

        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*args.certificate)
    server = await asyncio.start_server(Server(args).serve, "127.0.0.1", args.port, ssl=tls, backlog=1024)
    print("fake server is ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
