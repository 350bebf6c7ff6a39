"""A web server that does to its clients whatever it can think of, each path something else."""

from __future__ import annotations

import contextlib
import gzip
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import hostile_files as files

PIECE = bytes(2**16)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256


class HostileServer:
    """Serves :data:`PATHS` on loopback, until it is closed."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        ended = self.ended = threading.Event()
        self.requests: list[bytes] = []
        seen = self.requests

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    head = b""
                    while b"\r\n\r\n" not in head and (part := self.request.recv(65_536)):
                        head += part
                    seen.append(head)
                    path = head.split(b" ")[1].decode("latin-1") if head.count(b" ") > 1 else "/"
                    name = path.partition("?")[0].strip("/")
                    behaviour = PATHS.get(name.partition("/")[0], _not_found)
                    for piece in behaviour(name):
                        if ended.is_set():
                            return
                        if callable(piece):
                            piece(self.request)
                        elif isinstance(piece, float):
                            ended.wait(piece)
                        else:
                            self.request.sendall(piece)

        self.server = _Server((address, 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://{address}:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


Piece = bytes | float | Callable[[socket.socket], None]
Behaviour = Callable[[str], Iterator[Piece]]


def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def fixed(*pieces: Piece) -> Behaviour:
    return lambda _: iter(pieces)


def endless(*pieces: Piece, then: Piece, pause: float = 0.0, most: float = 30.0) -> Behaviour:
    def behave(_: str) -> Iterator[Piece]:
        yield from pieces
        end = time.monotonic() + most
        while time.monotonic() < end:
            yield then
            if pause:
                yield pause

    return behave


def redirect(to: str, status: str = "302 Found", body: bytes = b"") -> Behaviour:
    return fixed(answer(body, f"Location: {to}", "Connection: close", status=status))


def _not_found(_: str) -> Iterator[Piece]:
    yield answer(b"<html>", "Connection: close", status="404 Not Found")


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _chain(name: str) -> Iterator[Piece]:
    left = int(name.rpartition("/")[2])
    yield answer(b"", f"Location: /chain/{left - 1}" if left else "Location: /fine", status="302 Found")


_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_PNG = files.image()

#: Paths that serve an image after all.
GOOD: dict[str, Behaviour] = {
    "fine": fixed(answer(_PNG, "Content-Type: image/png")),
    "fine-as-text": fixed(answer(_PNG, "Content-Type: text/html")),
    "fine-without-length": fixed(_OK + b"Connection: close\r\n\r\n" + _PNG),
    "fine-slowly": fixed(_OK + b"Connection: close\r\n\r\n", _PNG[:100], 0.05, _PNG[100:]),
    "fine-elsewhere": redirect("/fine"),
    "fine-after-three": redirect("/chain/1"),
    "chain": _chain,
}
#: Paths whose answer never ends, or not in time.
SLOW: dict[str, tuple[Behaviour, str]] = {
    "slow-nothing": (endless(then=b"", pause=0.05), ""),
    "slow-body": (endless(answer(_PNG[:9], length=10**6), then=b"x", pause=0.05), ""),
    "slow-head": (endless(_OK, then=b"X", pause=0.05), ""),
    "slow-headers": (endless(_OK, then=b"X: y\r\n", pause=0.05), ""),
    "slow-chunks": (endless(_CHUNKED, then=b"1\r\nx\r\n", pause=0.05), ""),
    "slow-redirect-body": (redirect("/slow-nothing"), ""),
    "slow-continue": (endless(then=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.02), ""),
    "slow-silence-after-half": (fixed(answer(_PNG[:50], length=len(_PNG)), 30.0), ""),
}
_BIG = "--media-max-item-mib"
_BROKEN = "the server's answer is broken"
#: Paths that must be refused, and words of the reason.
BAD: dict[str, tuple[Behaviour, str]] = {
    "huge-declared": (fixed(answer(_PNG, length=10**12)), _BIG),
    "huge-just-above": (fixed(answer(b"", length=2**20 + 1)), _BIG),
    "huge-chunked": (endless(_CHUNKED, then=b"10000\r\n" + PIECE + b"\r\n"), _BIG),
    "huge-one-chunk": (endless(_CHUNKED + b"FFFFFFF\r\n", then=PIECE), _BIG),
    "huge-until-close": (endless(_OK + b"\r\n", then=PIECE), _BIG),
    "huge-http-1.0": (endless(b"HTTP/1.0 200 OK\r\n\r\n", then=PIECE), _BIG),
    "huge-png-text": (endless(_OK + b"\r\n" + _PNG[:33], then=files.chunk(b"tEXt", b"a\0" + bytes(60_000))), _BIG),
    "reset": (fixed(_reset), _BROKEN),
    "reset-in-body": (fixed(answer(_PNG[:50], length=5000), _reset), _BROKEN),
    "closed": (fixed(), _BROKEN),
    "closed-in-head": (fixed(b"HTTP/1.1 200 OK\r\nContent-"), _BROKEN),
    "closed-in-body": (fixed(answer(_PNG[:50], length=5000)), _BROKEN),
    "closed-in-chunk": (fixed(_CHUNKED + b"FF\r\n" + bytes(9)), _BROKEN),
    "half-an-image": (fixed(answer(files.half(_PNG), "Connection: close")), "broken"),
    "garbage": (fixed(bytes(range(256)) * 64), _BROKEN),
    "ssh": (fixed(b"SSH-2.0-OpenSSH_9.7\r\n"), _BROKEN),
    "smtp": (fixed(b"220 mail ESMTP\r\n"), _BROKEN),
    "redis": (fixed(b"-ERR unknown command\r\n"), _BROKEN),
    "only-a-body": (fixed(_PNG), _BROKEN),
    "tls": (fixed(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)), _BROKEN),
    "version-9": (fixed(b"HTTP/9.9 200 OK\r\n\r\n"), _BROKEN),
    "long-status": (endless(b"HTTP/1.1 200 ", then=b"O" * 65_536), _BROKEN),
    "long-header": (endless(_OK + b"X: ", then=b"y" * 65_536), _BROKEN),
    "long-header-name": (endless(_OK, then=b"y" * 65_536), _BROKEN),
    "many-headers": (endless(_OK, then=b"X: y\r\n" * 1000), _BROKEN),
    "many-cookies": (endless(_OK, then=b"Set-Cookie: a=b\r\n" * 1000), _BROKEN),
    "header-with-nul": (fixed(_OK + b"X: a\0b\r\n\r\n"), _BROKEN),
    "folded-header": (endless(_OK + b"X: a\r\n", then=b" b\r\n" * 10_000), _BROKEN),
    "length-negative": (fixed(_OK + b"Content-Length: -1\r\n\r\nx"), _BROKEN),
    "length-words": (fixed(_OK + b"Content-Length: ten\r\n\r\nx"), _BROKEN),
    "length-long": (fixed(_OK + b"Content-Length: " + b"9" * 400 + b"\r\n\r\nx"), ""),
    "two-lengths": (fixed(_OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), _BROKEN),
    "length-and-chunks": (
        fixed(_OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        "",
    ),
    "chunk-size-words": (fixed(_CHUNKED + b"zz\r\nx\r\n"), _BROKEN),
    "chunk-size-negative": (fixed(_CHUNKED + b"-5\r\nx\r\n"), _BROKEN),
    "chunk-size-long": (fixed(_CHUNKED + b"F" * 40 + b"\r\nx\r\n"), _BROKEN),
    "chunk-extension": (endless(_CHUNKED + b"1;", then=b"x" * 65_536, most=3), ""),
    "trailers": (endless(_CHUNKED + b"0\r\n", then=b"X: y\r\n" * 1000, most=3), ""),
    "transfer-gzip": (fixed(_OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), ""),
    "gzip": (fixed(answer(gzip.compress(_PNG), "Content-Encoding: gzip")), "compressed it (gzip)"),
    "gzip-bomb": (
        fixed(answer(gzip.compress(bytes(2**24)), "Content-Encoding: gzip")),
        "compressed it (gzip)",
    ),
    "gzip-twice": (
        fixed(answer(gzip.compress(gzip.compress(bytes(2**24))), "Content-Encoding: gzip, gzip")),
        "compressed it",
    ),
    "deflate-bomb": (
        fixed(answer(zlib.compress(bytes(2**24)), "Content-Encoding: deflate")),
        "compressed it (deflate)",
    ),
    "brotli": (fixed(answer(b"\x0b\x02\x80", "Content-Encoding: br")), "compressed it (br)"),
    "zstd": (fixed(answer(b"\x28\xb5\x2f\xfd", "Content-Encoding: zstd")), "compressed it (zstd)"),
    "encoding-unknown": (fixed(answer(b"x", "Content-Encoding: " + "z" * 2000)), "compressed it"),
    "gzip-unnamed": (fixed(answer(gzip.compress(_PNG))), "a gzip archive"),
    "switching": (fixed(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), ""),
    "partial": (
        fixed(answer(_PNG, "Content-Range: bytes 0-9/10", status="206 Partial Content")),
        "answered 206",
    ),
    "multiple": (fixed(answer(b"", status="300 Multiple Choices")), "answered 300"),
    "not-modified": (fixed(answer(b"", status="304 Not Modified")), "answered 304"),
    "no-content": (fixed(b"HTTP/1.1 204 No Content\r\n\r\n"), "answered 204"),
    "unauthorized": (fixed(answer(_PNG, "WWW-Authenticate: Basic", status="401 x")), "answered 401"),
    "proxy": (fixed(answer(_PNG, status="407 x")), "answered 407"),
    "forbidden": (fixed(answer(_PNG, status="403 Forbidden")), "answered 403"),
    "error": (fixed(answer(_PNG, status="500 x")), "answered 500"),
    "error-without-end": (endless(b"HTTP/1.1 503 x\r\n\r\n", then=PIECE, most=3), "answered 503"),
    "status-999": (fixed(answer(_PNG, status="999 x")), "answered 999"),
    "empty": (fixed(answer(b"")), "it is empty"),
    "page": (fixed(answer(b"<html>", "Content-Type: image/png")), "a web page"),
    "refresh": (fixed(answer(b"<html>", "Refresh: 0; url=http://127.0.0.2/")), "a web page"),
    "redirect-loop": (redirect("/redirect-loop"), "--media-max-redirects"),
    "redirect-there": (redirect("/redirect-back"), "--media-max-redirects"),
    "redirect-back": (redirect("/redirect-there"), "--media-max-redirects"),
    "redirect-deep": (redirect("/chain/9"), "--media-max-redirects"),
    "redirect-nowhere": (redirect(""), ""),
    "redirect-without": (fixed(answer(b"", status="302 Found")), "without a place to go to"),
    "redirect-body": (
        endless(b"HTTP/1.1 302 x\r\nLocation: http://127.0.0.2/\r\n\r\n", then=PIECE, most=3),
        "loopback",
    ),
}
_REDIRECTS = {
    "http://127.0.0.2/": "loopback",
    "//127.0.0.2/": "loopback",
    "http://[::1]/": "loopback",
    "http://[::ffff:127.0.0.2]/": "loopback",
    "http://10.0.0.1/": "private",
    "http://192.168.0.1/admin": "private",
    "http://172.16.0.1/": "private",
    "https://169.254.169.254/latest/meta-data/iam/": "a metadata service",
    "http://[fd00:ec2::254]/latest/": "a metadata service",
    "http://0.0.0.0/": "unspecified",
    "http://2130706434/": "is a number",
    "http://0x7f000002/": "is a number",
    "http://0177.0.0.2/": "is a number",
    "http://127.2/": "is a number",
    "http://private.test/": "private",
    "http://localhost/": "loopback",
    "file:///etc/passwd": "",
    "data:image/png;base64,AAAA": "",
    "ftp://127.0.0.1/": "",
    "gopher://127.0.0.1/": "",
    "javascript:alert(1)": "",
    "http://": "",
    "http:///x": "",
    "http://user:secret@127.0.0.1/": "credentials",
    "http://127.0.0.1:0/": "port 0",
    "http://127.0.0.1:99999/": "",
    "http://a b/": "",
    "http://127.0.0.1\\@127.0.0.2/": "",
    "http://%31%32%37.0.0.2/": "percent",
    "x" * 8000 + "/" + "y" * 100: "",
}
BAD |= {f"redirect-{number}": (redirect(to), why) for number, (to, why) in enumerate(_REDIRECTS.items())}
BAD |= {f"status-{code}": (redirect("http://10.0.0.1/", f"{code} x"), "private") for code in (301, 303, 307, 308)}
PATHS = GOOD | {name: behaviour for name, (behaviour, _) in {**SLOW, **BAD}.items()}
