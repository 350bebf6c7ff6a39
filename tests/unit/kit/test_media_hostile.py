"""Hostile URLs, servers and files: each is refused by name, and harms neither the event loop nor the memory.

`pytest -s` prints a table of all of them.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import hostile_files
import hostile_server
import psutil
import pytest
from hostile_server import HostileServer

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.media import Media
from dynamo_worker.kit.media_requests import MediaReference
from dynamo_worker.kit.media_settings import MediaSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: How many are tried at a time.
AT_A_TIME = 12
#: Most CPU time of the event loop at once, in seconds: 7 ms were measured, 49 with twenty threads for each core.
MOST_BLOCKED = 0.1
#: Growth of the worker's memory while everything hostile is tried, and after it, in bytes. What is in flight at a time
#: may have AT_A_TIME times 1 MiB, twice.
MOST_GROWTH, MOST_KEPT = 64 * 2**20, 24 * 2**20

SETTINGS = {
    "max_bytes": 2**20,
    "max_request_bytes": 2 * 2**20,
    "max_pixels": 4_000_000,
    "timeout": 40.0,
    "decode_timeout": 20.0,
    "connect_timeout": 10.0,
    "memory": 256 * 2**20,
    "networks": ("127.0.0.1/32",),
}
#: Names of this test's own, and the addresses they stand for.
NAMES = {
    "private.test": ["10.0.0.1"],
    "mixed.test": ["93.184.215.14", "10.0.0.1"],
    "mapped.test": ["::ffff:192.168.0.1"],
    "metadata.test": ["169.254.169.254"],
    "loopback.test": ["::1"],
    "nat64.test": ["64:ff9b::a00:1"],
    "zone.test": ["fe80::1%lo"],
    "many.test": ["10.0.0.1"] * 10_000,
    "localhost": ["127.0.0.2"],
}


def look_up(host: str, port: int, *_: object, **__: object) -> list[tuple[Any, ...]]:
    name = host.rstrip(".")
    if name not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    family = {True: socket.AF_INET6, False: socket.AF_INET}
    return [(family[":" in address], socket.SOCK_STREAM, 6, "", (address, port)) for address in NAMES[name]]


#: URLs that must be refused, and words of the reason.
URLS = {
    **{f"http://{host}/": "loopback" for host in ("127.0.0.2", "127.255.255.255", "[::1]", "[::ffff:127.0.0.2]")},
    **{f"http://{host}/": "private" for host in ("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255")},
    **{f"http://{host}/": "private" for host in ("192.168.1.1", "100.64.0.1", "[fc00::1]", "[fd12::1]", "[fec0::1]")},
    **{f"http://{host}/": "private" for host in ("[::ffff:10.0.0.1]", "[::ffff:a00:1]", "[64:ff9b::a00:1]")},
    **{f"http://{host}/": "link-local" for host in ("169.254.1.1", "[fe80::1]", "[::ffff:169.254.1.1]")},
    **{f"http://{host}/": "a metadata service" for host in ("169.254.169.254", "169.254.170.2", "100.100.100.200")},
    **{f"http://{host}/": "a metadata service" for host in ("192.0.0.192", "168.63.129.16", "[fd00:ec2::254]")},
    **{f"http://{host}/": "a metadata service" for host in ("[::ffff:a9fe:a9fe]", "[64:ff9b::169.254.169.254]")},
    **{f"http://{host}/": "unspecified" for host in ("0.0.0.0", "0.1.2.3", "[::]", "[::ffff:0.0.0.0]")},
    **{f"http://{host}/": "multicast" for host in ("224.0.0.1", "239.255.255.250", "[ff02::1]")},
    **{f"http://{host}/": "reserved" for host in ("255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1")},
    **{f"http://{host}/": "reserved" for host in ("203.0.113.9", "[2001:db8::1]", "[::127.0.0.1]", "[100::1]")},
    **{f"http://{host}/": "reserved" for host in ("[::ffff:0:127.0.0.1]", "[2001:0:a00:1::1]")},
    **{f"http://{host}/": "a tunnel" for host in ("[2002:7f00:1::]", "[2002:a00:1::1]", "[64:ff9b:1::a00:1]")},
    **{f"http://{host}/": "is a number" for host in ("2130706434", "0x7f000002", "0x7f.0.0.2", "0177.0.0.2")},
    **{f"http://{host}/": "is a number" for host in ("017700000002", "127.2", "127.0.2", "0", "0x", "1.2.3.4.5")},
    **{f"http://{host}/": "is a number" for host in ("127.0.0.256", "127.0.0.02", "127.0.0.0x2", "10.0.0.1.")},
    **{f"http://{host}/": "loopback" for host in ("localhost", "LOCALHOST", "localhost.", "loopback.test")},
    "http://private.test/": "private",
    "https://private.test/": "private",
    "http://mixed.test/": "private",
    "http://mapped.test/": "private",
    "http://metadata.test/": "a metadata service",
    "http://nat64.test/": "private",
    "http://zone.test/": "link-local",
    "http://many.test/": "private",
    "http://unknown.test/": "cannot be looked up",
    "http://.test/": "",
    "http://a..test/": "",
    "http://-/": "cannot be looked up",
    "http://public.test@127.0.0.2/": "credentials",
    "http://user:secret@private.test/": "credentials",
    "http://@127.0.0.2/": "credentials",
    "http://127.0.0.1:80@127.0.0.2:80/": "credentials",
    "http://127.0.0.2#@public.test/": "loopback",
    "http://127.0.0.2?@public.test/": "loopback",
    "http://public.test\\@127.0.0.2/": "backslash",
    "http://127.0.0.2\\.public.test/": "backslash",
    "http:\\\\127.0.0.2/": "backslash",
    "http://public.test%40127.0.0.2/": "percent",
    "http://127%2e0%2e0%2e2/": "percent",
    "http://%6c%6f%63alhost/": "percent",
    "http://127.0.0.2%00.public.test/": "percent",
    "http://[fe80::1%25lo]/": "percent",
    "http://127.0.0.2%23.public.test/": "percent",
    "http://\uff11\uff12\uff17.0.0.2/": "",
    "http://127\u30020\u30020\u30022/": "",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2461/": "",
    "http://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3/": "",
    "http://loc\u00adalhost/": "",
    "http://local\u200bhost/": "",
    "http://\u202elocalhost/": "",
    "http://pr\u0456vate.test/": "cannot be looked up",
    "http://\ud800.test/": "",
    "http://xn--/": "",
    "http://xn--zzzzzzzzzz99999/": "",
    "http://" + "a" * 64 + ".test/": "",
    "http://" + "a." * 200 + "test/": "not a valid name",
    "http://" + "a" * 5000 + "/": "",
    "http://127.0.0.1/" + "a" * 9000: "at most 8192",
    "http://127.0.0.2\t/": "control character",
    "http://127.0.0.2\r\nX: y/": "control character",
    "http://127.0.0.2/\0": "control character",
    "ht\ntp://127.0.0.2/": "",
    " http://127.0.0.2/": "",
    "http://127.0.0.1 /": "space",
    "http://a b/": "space",
    "http://": "no host",
    "http:///x": "",
    "http:127.0.0.2": "",
    "http:/127.0.0.2": "",
    "http://:80/": "",
    "http://127.0.0.1:0/": "port 0",
    "http://127.0.0.1:65536/": "",
    "http://127.0.0.1:-1/": "",
    "http://127.0.0.1:x/": "",
    "http://127.0.0.1:80:80/": "",
    "http://[127.0.0.1]/": "",
    "http://[::1/": "",
    "http://::1/": "",
    "http://[v1.x]/": "",
    "http://[::1]x/": "",
    "http://127.0.0.1:1/": "no connection",
    "//127.0.0.2/": "no scheme",
    "/etc/passwd": "no scheme",
    "C:\\x.png": "expected a URL",
    "": "no scheme",
    "x" * 100_000: "no scheme",
    ":" * 1000: "expected a URL",
    "ftp://127.0.0.1/x": "expected a URL",
    "gopher://127.0.0.1:6379/_FLUSHALL": "expected a URL",
    "dict://127.0.0.1/": "expected a URL",
    "s3://bucket/x": "expected a URL",
    "unix:/run/docker.sock": "expected a URL",
    "javascript:alert(1)": "expected a URL",
    "jar:http://x!/": "expected a URL",
    "blob:x": "expected a URL",
    "about:blank": "expected a URL",
    "data:": "not valid",
    "data:,": "not base64",
    "data:,hello": "not base64",
    "data:image/png,%89PNG": "not base64",
    "data:image/png;base64": "not valid",
    "data:image/png;base64,": "it is empty",
    "data:image/png;base64,A": "multiple of four",
    "data:image/png;base64,====": "not valid base64",
    "data:image/png;base64,AA==AA==": "not valid base64",
    "data:image/png;base64,A===": "not valid base64",
    "data:image/png;base64,!!!!": "not valid base64",
    "data:image/png;base64,AA%3D%3D": "not valid base64",
    "data:image/png;base64,AAA_": "not valid base64",
    "data:image/png;base64,\u00e4\u00f6\u00fc\u00df": "not valid base64",
    "data:image/png;base64,\ud800AAA": "not valid base64",
    "data:image/png;base64," + "\n" * 100_000: "it is empty",
    "data:" + "x" * 100_000 + ";base64,AAAA": "not valid",
    "data:image/png;base64;" + "a=b;" * 100 + "base64,AAAA": "not valid",
    "data:image/png;base64," + "A" * 2 * 2**20: "--media-max-item-mib",
    "data:image/svg+xml;base64,PHN2Zy8+": "an SVG drawing",
    "data:text/html;base64,PGh0bWw+": "a web page",
    "file:///etc/passwd": "--media-allow-path",
    "file:///dev/zero": "--media-allow-path",
    "file:///proc/self/environ": "--media-allow-path",
    "file://localhost/etc/passwd": "--media-allow-path",
    "file:/etc/passwd": "--media-allow-path",
    "file:etc/passwd": "--media-allow-path",
    "file://127.0.0.2/share/x": "--media-allow-path",
    "file:///etc/%00passwd": "",
    "file:///etc/\ud800": "",
    "file:///" + "a" * 10_000: "",
    "file:///" + "../" * 3000 + "etc/passwd": "",
}


def hostile_paths(directory: Path) -> dict[str, str]:
    """Return URLs of files in and around an allowed directory, and words of the reason."""
    inside, outside = directory / "media", directory / "media-secret"
    inside.mkdir(), outside.mkdir()
    (outside / "x.png").write_bytes(hostile_files.image())
    (inside / "link.png").symlink_to(outside / "x.png")
    (inside / "links").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    os.mkfifo(inside / "pipe")
    (inside / "large").write_bytes(bytes(2**20 + 1))
    (inside / "page").write_bytes(b"<html>")
    (inside / "locked.png").write_bytes(b"")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.fspath(inside / "socket"))
    listening.close()
    base, below = f"file://{inside}", "--media-allow-path"
    return {
        f"file://{outside}/x.png": below,
        f"{base}/../media-secret/x.png": below,
        f"{base}/%2e%2e/media-secret/x.png": below,
        f"{base}/..%2fmedia-secret/x.png": below,
        f"{base}-secret/x.png": below,
        f"{base}/link.png": below,
        f"{base}/links/x.png": below,
        f"{base}/loop": "cannot be read",
        f"{base}/pipe": "no regular file",
        f"{base}/socket": "cannot be read",
        f"{base}": "",
        f"{base}/large": "--media-max-item-mib",
        f"{base}/page": "a web page",
        f"{base}/locked.png": "it is empty",
        f"{base}/missing.png": "cannot be read",
        f"{base}/{'a' * 300}": "cannot be read",
        f"{base}/x%00.png": "",
    }


@pytest.fixture
def server() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


class Watch:
    """Looks at the memory of this process and of the decoders all the time, and at each callback of the event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process = psutil.Process()
        self.longest, self.what = 0.0, ""
        self.most = self.most_of_decoder = 0
        self.decoders: list[int] = []
        self.ended = threading.Event()
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            begin = time.thread_time()
            run(handle)
            taken = time.thread_time() - begin
            if taken > self.longest:
                owner = getattr(handle._callback, "__self__", None)
                self.longest, self.what = taken, repr(owner if isinstance(owner, asyncio.Task) else handle)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.memory())
            for pid in self.decoders:
                try:
                    self.most_of_decoder = max(self.most_of_decoder, psutil.Process(pid).memory_info().rss)
                except psutil.Error:
                    continue

    def memory(self) -> int:
        """Bytes of memory of its own, and of what is shared with decoders."""
        return self.process.memory_info().rss

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


async def refusal(media: Media, url: str) -> str:
    """Return why a URL is refused."""
    try:
        async with media.load([MediaReference(2, 3, url)]) as images:
            return f"ACCEPTED: {images[0].format}"
    except InvalidRequestError as error:
        return str(error)


async def refusals(media: Media, cases: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return name, expected words and reason for each of (name, URL, words)."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(name: str, url: str, words: str) -> tuple[str, str, str]:
        async with places:
            return name, words, await refusal(media, url)

    return list(await asyncio.gather(*(one(*case) for case in cases)))


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def wrong(found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return those that were not refused as expected, or in a message that says too much."""
    return [
        (name[:100], words, reason)
        for name, words, reason in found
        if not reason.startswith("image 2 of 3 (")
        or words not in reason
        or len(reason) > 600
        or "secret@" in reason
        or "Traceback" in reason
        or not reason.isprintable()
    ]


def table(found: list[tuple[str, str, str]]) -> None:
    for name, _, reason in found:
        shown = "".join(character if character.isprintable() else "?" for character in name)
        print(f"  {shown[:48]:48}  {reason.partition('): ')[2][:110]}")


@pytest.mark.timeout(300)
def test_everything_hostile_is_refused_by_name(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    cases = [(url, url, words) for url, words in {**URLS, **hostile_paths(tmp_path)}.items()]
    cases += [(name, f"{server.url}/{name}", words) for name, (_, words) in hostile_server.BAD.items()]
    cases += [(name, data_url(data), words) for name, data, words in hostile_files.FILES if len(data) <= 2**20]
    children = set(psutil.Process().children())  # such as Python's resource tracker
    media = Media(MediaSettings(**SETTINGS, paths=(str(tmp_path / "media"),)))
    slow = Media(MediaSettings(**{**SETTINGS, "timeout": 1.5}))

    async def check() -> tuple[list[tuple[str, str, str]], int, int]:
        await media.start()
        watch.decoders = media.processes()
        for name in hostile_server.GOOD:  # memory that is needed once, whoever asks
            path = "chain/2" if name == "chain" else name
            async with media.load([MediaReference(1, 1, f"{server.url}/{path}")]) as images:
                assert images[0].data == hostile_files.image(), name
        await refusals(media, cases[::7])
        gc.collect()
        gc.freeze()  # what pytest has is not ours to look through
        await asyncio.sleep(0)  # what follows is a callback of its own
        before = watch.memory()
        watch.most = watch.longest = 0
        found = await refusals(media, cases)
        late = [(name, f"{server.url}/{name}", words) for name, (_, words) in hostile_server.SLOW.items()]
        found += [(name, "--media-timeout", reason) for name, _, reason in await refusals(slow, late)]
        after = watch.memory()
        for data in hostile_files.FINE.values():
            async with media.load([MediaReference(1, 1, data_url(data))]) as images:
                assert images[0].data == data
        gc.unfreeze()
        await media.close()
        await slow.close()
        return found, before, after

    begin = time.monotonic()
    watch = Watch(monkeypatch)
    with watch:
        found, before, after = asyncio.run(check())
    table(found)
    print(
        f"{len(found)} refused in {time.monotonic() - begin:.1f} s; memory {before >> 20} MiB before, "
        f"{watch.most >> 20} MiB at most, {after >> 20} MiB after; decoder {watch.most_of_decoder >> 20} MiB at most; "
        f"event loop busy for {watch.longest * 1000:.0f} ms at most: {watch.what[:300]}"
    )
    assert wrong(found) == []
    assert len(found) >= 300
    assert watch.most - before < MOST_GROWTH
    assert after - before < MOST_KEPT
    assert watch.longest < MOST_BLOCKED, watch.what
    assert set(psutil.Process().children()) <= children
