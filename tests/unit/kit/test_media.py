"""Loading images: what an engine gets, what requests share, and what is left when somebody leaves."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gc
import io
import mmap
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import hostile_files
import psutil
import pytest
import trustme
from dynamo.llm.exceptions import WorkerUnavailable
from hostile_files import image
from hostile_server import HostileServer
from PIL import Image

from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.errors import InvalidRequestError, StartError
from dynamo_worker.kit import media_threads
from dynamo_worker.kit.media import LoadedImage, Media
from dynamo_worker.kit.media_decoders import FileInMemory
from dynamo_worker.kit.media_requests import MediaReference, images
from dynamo_worker.kit.media_settings import MediaSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

MIB = 2**20
#: A small picture that takes a decoder minutes.
HANGS = hostile_files.jpeg_of_many_scans(20_000)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def references(*urls: str) -> list[MediaReference]:
    return [MediaReference(number, len(urls), url) for number, url in enumerate(urls, 1)]


def children() -> set[psutil.Process]:
    """Return the children of this process; other tests may have left one, such as Python's resource tracker."""
    return set(psutil.Process().children())


@contextlib.asynccontextmanager
async def media_with(**settings: Any) -> AsyncIterator[Media]:
    before = children()
    media = Media(MediaSettings(**{"networks": ("127.0.0.0/8",), "decoders": 1, **settings}))
    try:
        yield media
    finally:
        await media.close()
        assert media.processes() == []
        assert children() <= before
        gc.collect()
        assert not memory_files()


def memory_files() -> list[str]:
    """Return the descriptors of files in memory that this process holds."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [target for target in found if "memfd:media" in target]


async def load(media: Media, *urls: str, scope: str | None = None) -> list[LoadedImage]:
    async with media.load(references(*urls), scope=scope) as loaded:
        return loaded


async def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


# --- What an engine gets


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_an_engine_gets_the_pixels_that_pillow_makes() -> None:
    source = Image.open(io.BytesIO(image()))
    files = {kind: image(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}
    files |= {f"PNG {mode}": saved(source.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")}
    files["JPEG CMYK"] = saved(source.convert("CMYK"), "JPEG")
    files["PNG large"] = hostile_files.png(1000, 1000)  # not copied, as small ones are

    async def check() -> None:
        async with media_with() as media:
            for name, data in files.items():
                expected = Image.open(io.BytesIO(data)).convert("RGB")
                async with media.load(references(data_url(data))) as (loaded,):
                    assert (loaded.format, loaded.width, loaded.height) == (name.split()[0], *expected.size)
                    assert bytes(loaded.pixels) == expected.tobytes() == loaded.to_pil().tobytes(), name
                    assert loaded.pixels.readonly
                    assert loaded.data == data
                del loaded
            # Pillow would clip 16 bits, not scale them.
            (loaded,) = await load(media, data_url(saved(Image.new("I;16", (4, 4), 0x8000))))
            assert set(loaded.pixels) == {0x80}
            # Phones write several JPEGs into one file.
            first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
            (loaded,) = await load(media, data_url(saved(first, "MPO", save_all=True, append_images=[second])))
            assert loaded.format == "JPEG"
            assert loaded.pixels[0] > 150 > 50 > loaded.pixels[2]

    asyncio.run(check())


def test_images_keep_their_order_and_the_same_content_is_decoded_once(server: HostileServer) -> None:
    other = image("PNG", (10, 20))

    async def check() -> None:
        async with media_with() as media:
            urls = (data_url(other), f"{server.url}/fine", data_url(image()), f"{server.url}/fine-as-text")
            loaded = await load(media, *urls)
            assert [(one.width, one.height) for one in loaded] == [(10, 20), (64, 48), (64, 48), (64, 48)]
            assert len({one.hash for one in loaded}) == 2
            assert loaded[1].pixels is loaded[2].pixels is loaded[3].pixels

    asyncio.run(check())


def test_a_request_of_text_costs_nothing() -> None:
    async def check() -> None:
        async with media_with() as media, media.load([]) as loaded:
            assert loaded == []
            assert media.processes() == []

    asyncio.run(check())


# --- What requests name


def named(**media: Any) -> list[MediaReference]:
    return images({"token_ids": [1], "multi_modal_data": media})


def test_requests_name_images_by_url() -> None:
    assert images({"token_ids": [1]}) == images({"multi_modal_data": None}) == named() == named(image_url=[]) == []
    assert named(image_url=[{"Url": "https://a"}, {"RawUrl": "b"}], video_url=[]) == [
        MediaReference(1, 2, "https://a"),
        MediaReference(2, 2, "b"),
    ]


@pytest.mark.parametrize(
    ("media", "words"),
    [
        ({"video_url": [{"Url": "x"}]}, "'video_url' is not supported"),
        ({"audio_url": [{"Url": "x"}]}, "'audio_url' is not supported"),
        ({"image_url": "https://a"}, "expected a list"),
        ({"image_url": {"Url": "x"}}, "expected a list"),
        ({"image_url": ["https://a"]}, r"image_url\[0\]: expected an object"),
        ({"image_url": [{"Url": "x"}, {"Url": 7}]}, r"image_url\[1\]: expected an object"),
        ({"image_url": [{"Decoded": {"shape": [1]}}]}, "the frontend has decoded it"),
        ({"image_url": [{"UuidOnly": "7"}]}, "has a UUID but no URL"),
    ],
)
def test_other_media_are_refused_by_name(media: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        named(**media)


# --- What requests share


def test_the_same_url_is_fetched_once_at_a_time_but_not_across_scopes(server: HostileServer) -> None:
    async def check() -> None:
        async with media_with() as media:
            url = f"{server.url}/fine-slowly"
            await asyncio.gather(*(load(media, url, url) for _ in range(5)))
            assert len(server.requests) == 1
            await load(media, url)  # what a URL stands for may change
            assert len(server.requests) == 2
            await asyncio.gather(load(media, url, scope="a"), load(media, url, scope="b"), load(media, url))
            assert len(server.requests) == 5

    asyncio.run(check())


def test_who_leaves_a_shared_download_does_not_end_it_for_others(server: HostileServer) -> None:
    async def check() -> None:
        async with media_with() as media:
            url = f"{server.url}/fine-slowly"
            first = asyncio.ensure_future(load(media, url))
            second = asyncio.ensure_future(load(media, url))
            await until(lambda: server.requests)
            first.cancel()
            assert (await second)[0].data == image()
            assert len(server.requests) == 1

    asyncio.run(check())


def test_a_shared_download_that_is_too_much_for_one_request_is_not_for_another(server: HostileServer) -> None:
    async def check() -> None:
        size = len(image())
        async with media_with(max_bytes=10_000, max_request_bytes=10_000 + size // 2) as media:
            fine = f"{server.url}/fine-slowly"
            much = asyncio.ensure_future(load(media, data_url(bytes(10_000)), fine))
            little = asyncio.ensure_future(load(media, fine))
            with pytest.raises(InvalidRequestError, match=r"image 2 of 2 .*--media-max-request-mib"):
                await much
            assert (await little)[0].data == image()

    asyncio.run(check())


def test_decoded_images_are_kept_by_content_within_bounds() -> None:
    first, second = image("PNG", (64, 48)), image("PNG", (48, 64))

    async def check() -> None:
        async with media_with(cache_bytes=64 * 48 * 3 + 5000) as media:
            one = (await load(media, data_url(first)))[0].pixels
            assert (await load(media, data_url(first)))[0].pixels is one
            assert (await load(media, data_url(first), scope="x"))[0].pixels is not one
            assert (await load(media, data_url(first)))[0].pixels is not one  # that of "x" has taken its place
            await load(media, data_url(second))
            assert media._parts.cache.size == 64 * 48 * 3 + 4096
        async with media_with(cache_bytes=0) as media:
            one = (await load(media, data_url(first)))[0].pixels
            assert (await load(media, data_url(first)))[0].pixels is not one

    asyncio.run(check())


# --- Limits of a request


def test_limits_of_a_request_name_their_flags(server: HostileServer) -> None:
    async def check() -> None:
        async with media_with(max_items=2, max_bytes=10_000, max_request_bytes=15_000) as media:
            with pytest.raises(InvalidRequestError, match=r"has 3 images, at most 2 .*--media-max-items"):
                await load(media, *[data_url(image())] * 3)
            fine = f"{server.url}/fine"
            with pytest.raises(InvalidRequestError, match=r"--media-max-request-mib"):
                await load(media, fine, f"{fine}?again=secret")
            with pytest.raises(InvalidRequestError, match=r"^image 1 of 2 .*at most 10000 .*--media-max-item-mib"):
                await load(media, data_url(bytes(10_001)), fine)
        settings = {"max_pixels": 10_000, "memory": 4 * MIB, "max_bytes": 10_000, "max_request_bytes": 100_000}
        async with media_with(**settings, max_items=200) as media:
            many = [
                data_url(hostile_files.png(100, 100, hostile_files.chunk(b"tEXt", b"%d\0" % at))) for at in range(120)
            ]
            with pytest.raises(InvalidRequestError, match=r"3600000 bytes when decoded, at most 3145728"):
                await load(media, *many)

    asyncio.run(check())


def limited(media: Media, timeout: float) -> None:
    """Change what requests have from now on."""
    media._parts = media._parts._replace(settings=dataclasses.replace(media._parts.settings, timeout=timeout))


def test_who_finds_no_memory_waits_for_it_and_migrates_if_there_is_none_in_time() -> None:
    first, second = data_url(hostile_files.png(500, 700)), data_url(hostile_files.png(700, 500))

    async def compete(media: Media) -> None:
        async with media.load(references(first)):
            limited(media, 1.0)
            with pytest.raises(WorkerUnavailable, match=r"no room for media within 1 s.*--media-memory-mib"):
                await load(media, second)
            limited(media, 60.0)
            waiting = asyncio.ensure_future(load(media, second))
            await asyncio.sleep(0.3)
            assert not waiting.done()
        assert (await waiting)[0].width == 700

    async def check() -> None:
        settings = {"max_pixels": 400_000, "memory": 2 * MIB, "max_bytes": 10_000, "max_request_bytes": 100_000}
        async with media_with(**settings) as media:
            await media.start()
            await compete(media)
            assert media._parts.pixels.free == media._parts.pixels.most
            assert media._parts.files.free == media._parts.files.most

    asyncio.run(check())


def test_a_file_that_outgrows_the_memory_migrates(server: HostileServer) -> None:
    async def check() -> None:
        settings = {"max_pixels": 1000, "memory": 8 * MIB, "max_bytes": MIB, "max_request_bytes": MIB}
        async with media_with(**settings, fetches=8) as media:
            urls = [f"{server.url}/slow-silence-after-half?{at}" for at in range(3)]
            slow = [asyncio.ensure_future(load(media, url)) for url in urls]  # each has half a MiB for its file
            await until(lambda: len(server.requests) == 3)
            with pytest.raises(WorkerUnavailable, match="no memory for more media"):
                await load(media, data_url(bytes(400_000)))
            for task in slow:
                task.cancel()
            await asyncio.wait(slow)
            assert media._parts.files.free == media._parts.files.most
            assert (await load(media, data_url(hostile_files.png(9, 9))))[0].width == 9

    asyncio.run(check())


# --- Decoders


def test_a_decoder_that_hangs_harms_only_its_request() -> None:
    async def check() -> None:
        async with media_with(decode_timeout=4, decoders=2) as media:
            await media.start()
            hanging = asyncio.ensure_future(load(media, data_url(HANGS)))
            await asyncio.sleep(0.2)
            assert (await load(media, data_url(image())))[0].width == 64
            with pytest.raises(InvalidRequestError, match=r"takes more than 4 s \(--media-decode-timeout\)"):
                await hanging
            assert len(media.processes()) == 1
            assert (await load(media, data_url(image("JPEG"))))[0].width == 64

    asyncio.run(check())


def test_an_image_that_ends_two_decoders_harms_only_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(media: Media, number: signal.Signals) -> None:
        await until(lambda: media.processes())
        (pid,) = media.processes()
        await until(lambda: psutil.Process(pid).cpu_times().user > 0.5)  # it decodes
        os.kill(pid, number)
        await until(lambda: pid not in media.processes())

    async def check() -> None:
        async with media_with(decode_timeout=100, timeout=100) as media:
            await media.start()
            hanging = asyncio.ensure_future(load(media, data_url(HANGS)))
            await crash(media, signal.SIGSEGV)
            await crash(media, signal.SIGKILL)
            with pytest.raises(InvalidRequestError, match=r"the image .*: it has ended its decoder, and another one"):
                await hanging
            assert caplog.text.count("A decoder for images has ended") == 2
            assert (await load(media, data_url(image())))[0].width == 64
            (pid,) = media.processes()
            for number in (signal.SIGINT, signal.SIGTERM):  # for the worker, or its whole group
                os.kill(pid, number)
            assert (await load(media, data_url(image("JPEG"))))[0].width == 64
            assert media.processes() == [pid]
            os.kill(pid, signal.SIGKILL)  # while it is idle
            await until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
            assert (await load(media, data_url(image("GIF"))))[0].width == 64
            assert "An idle decoder for images has ended" in caplog.text

    asyncio.run(check())


def test_all_decoders_busy_is_no_fault_of_a_request() -> None:
    async def check() -> None:
        async with media_with(timeout=2.0, decode_timeout=60) as media:
            await media.start()
            first, second = (asyncio.ensure_future(load(media, data_url(data))) for data in (HANGS, HANGS + b"x"))
            with pytest.raises(WorkerUnavailable, match=r"waited for one of 1 decoders \(--media-decoders\)"):
                await second
            with pytest.raises(InvalidRequestError, match="--media-timeout"):
                await first

    asyncio.run(check())


def test_memory_that_a_decoder_asks_for_has_a_bound() -> None:
    async def check() -> None:
        async with media_with(max_pixels=1000) as media:
            await media.start()
            (pid,) = media.processes()
            now = psutil.Process(pid).memory_info().vms
            _, most = psutil.Process(pid).rlimit(psutil.RLIMIT_AS)
            assert now < most < now + 256 * MIB

    asyncio.run(check())


def test_nobody_changes_what_somebody_else_reads() -> None:
    target = FileInMemory()
    with contextlib.closing(target):
        target.resize(2 * MIB)
        with mmap.mmap(target.descriptor, 2 * MIB) as writing:
            writing[:3] = b"abc"
            with pytest.raises(OSError, match="busy"):
                target.finished()  # a decoder that could still write
        pixels = target.finished()
        with pytest.raises(PermissionError):
            os.pwrite(target.descriptor, b"x", 0)
        with pytest.raises(PermissionError):  # whoever reads beyond the end of a file gets SIGBUS
            os.ftruncate(target.descriptor, 0)
        with pytest.raises(PermissionError):
            mmap.mmap(target.descriptor, 2 * MIB)
        assert bytes(pixels[:3]) == b"abc"


def test_decoders_end_with_a_worker_that_is_killed() -> None:
    code = (
        "import asyncio\n"
        "from dynamo_worker.kit.media import Media\n"
        "from dynamo_worker.kit.media_settings import MediaSettings\n"
        "async def main():\n"
        "    media = Media(MediaSettings())\n"
        "    await media.start()\n"
        "    print(*media.processes(), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        decoders = [psutil.Process(int(pid)) for pid in worker.stdout.readline().split()]
        assert len(decoders) == 2
        worker.kill()
    _, alive = psutil.wait_procs(decoders, timeout=10)
    assert not alive


def test_a_decoder_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with media_with() as media:
            monkeypatch.setattr("dynamo_worker.kit.media_decoders._PROGRAM", "no.such.module")
            with pytest.raises(StartError, match="a decoder for images does not start: exit code 1"):
                await media.start()
            with pytest.raises(WorkerUnavailable, match="does not start"):
                await load(media, data_url(image()))

    asyncio.run(check())


# --- Leaving


@pytest.mark.parametrize("url", ["/slow-body", "/slow-nothing", "hangs"])
def test_a_client_that_leaves_ends_its_download_and_its_decoder(server: HostileServer, url: str) -> None:
    async def check() -> None:
        async with media_with(decode_timeout=60) as media:
            await media.start()
            (pid,) = media.processes()
            task = asyncio.ensure_future(load(media, data_url(HANGS) if url == "hangs" else server.url + url))
            await until(lambda: psutil.Process(pid).cpu_times().user > 0.5 if url == "hangs" else server.requests)
            begin = time.monotonic()
            task.cancel()
            await asyncio.wait({task})
            assert time.monotonic() - begin < 5
            assert task.cancelled()
            assert not media._parts.downloads._shared
            assert psutil.pid_exists(pid) == (url != "hangs")
            assert media._parts.files.free == media._parts.files.most
            assert not [
                one for one in psutil.Process().net_connections() if one.raddr and one.raddr.port == server.port
            ]

    asyncio.run(check())


def test_a_worker_that_stops_lets_requests_migrate_at_once(server: HostileServer) -> None:
    async def check() -> None:
        before = children()
        media = Media(MediaSettings(networks=("127.0.0.0/8",)))
        await media.start()
        urls = [f"{server.url}/slow-body", f"{server.url}/slow-nothing", data_url(HANGS)]
        tasks = [asyncio.ensure_future(load(media, url)) for url in urls]
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        await media.close()
        assert time.monotonic() - begin < 5
        for task in tasks:
            with pytest.raises(WorkerUnavailable, match="it stops"):
                await task
        with pytest.raises(WorkerUnavailable, match="it stops"):
            await load(media, data_url(image()))
        await media.close()
        assert children() <= before
        assert not memory_files()

    asyncio.run(check())


# --- The network


def names(monkeypatch: pytest.MonkeyPatch, **addresses: list[str]) -> list[str]:
    """Let names stand for addresses, each lookup the next one; return the list of what is looked up."""
    asked: list[str] = []

    def look_up(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        left = addresses[host.partition(".")[0]]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (left.pop(0) if len(left) > 1 else left[0], port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_connection_goes_to_the_address_that_was_checked(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = HostileServer("127.0.0.2")
    asked = names(monkeypatch, rebinding=["127.0.0.1", "127.0.0.2"])

    async def check() -> None:
        async with media_with(networks=("127.0.0.1/32",)) as media:
            await load(media, f"http://rebinding.test:{server.port}/fine")
            assert asked == ["rebinding.test"]
            assert b"\r\nHost: rebinding.test:" in server.requests[0]
            with pytest.raises(InvalidRequestError, match=r"address 127.0.0.2 is not public \(loopback\)"):
                await load(media, f"http://rebinding.test:{elsewhere.port}/fine")
            # Even if a resolver lets something through:
            monkeypatch.setattr("dynamo_worker.kit.media_http._Resolver.resolve", unchecked)
            with pytest.raises(InvalidRequestError, match=r"address 127.0.0.2 is not public \(loopback\)"):
                await load(media, f"http://other.test:{elsewhere.port}/fine")

    async def unchecked(_: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        kind = {"family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST}
        return [{"hostname": host, "host": "127.0.0.2", "port": port, **kind}]

    asyncio.run(check())
    elsewhere.close()
    assert elsewhere.requests == []


def test_only_allowed_hosts_at_every_hop(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, images=["127.0.0.1"], other=["127.0.0.1"], cdn=["127.0.0.1"])

    async def check() -> None:
        async with media_with(hosts=("images.test", ".example.test")) as media:
            for host in ("images.test", "IMAGES.test", "images.test.", "cdn.example.test"):
                await load(media, f"http://{host}:{server.port}/fine-elsewhere")
            for host in ("other.test", "example.test", "images.test.other.test", "127.0.0.1"):
                with pytest.raises(InvalidRequestError, match="--media-allow-host"):
                    await load(media, f"http://{host}:{server.port}/fine")
            with pytest.raises(InvalidRequestError, match=r"a redirect to http://127.0.0.2/: .*--media-allow-host"):
                await load(media, f"http://images.test:{server.port}/redirect-0")

    asyncio.run(check())


def test_no_proxy_of_the_environment_is_used(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def check() -> None:
        async with media_with() as media:
            await load(media, f"{server.url}/fine")

    asyncio.run(check())


def test_nothing_secret_is_sent_or_shown(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with media_with() as media:
            with pytest.raises(InvalidRequestError) as refused:
                await load(media, f"{server.url}/error/{'a' * 500}?signature=secret#secret")
            assert "secret" not in str(refused.value)
            assert len(str(refused.value)) < 250
            head = server.requests[0].lower()
            assert b"\r\naccept-encoding: identity\r\n" in head
            assert b"cookie" not in head
            assert b"authorization" not in head

    asyncio.run(check())


def test_lookups_that_hang_keep_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: release.wait() and [])
    monkeypatch.setattr(media_threads, "_MOST", 3)

    async def check() -> None:
        async with media_with(connect_timeout=0.3) as media:
            await media._parts.downloads._http._client()
            before = threading.active_count()
            for _ in range(2):
                tasks = [load(media, f"http://hangs-{at}.test/") for at in range(5)]
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert "not looked up within 0.3 s (--media-connect-timeout)" in str(result)
            assert threading.active_count() <= before + 3
            release.set()

    asyncio.run(check())


def test_a_connection_that_does_not_come_about_has_a_limit(server: HostileServer) -> None:
    async def check() -> None:
        async with media_with(connect_timeout=0.5) as media:
            with pytest.raises(InvalidRequestError, match=r"no connection to 127.0.0.1 within 0.5 s"):
                await load(media, f"https://127.0.0.1:{server.port}/")  # it waits for a request, not for TLS

    asyncio.run(check())


def test_certificates_are_checked_for_the_name_of_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("images.test").configure_cert(context)
    names(monkeypatch, images=["127.0.0.1"], other=["127.0.0.1"])
    data = image()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        writer.close()

    async def check() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        async with media_with() as media:
            assert (await load(media, f"https://images.test:{port}/"))[0].data == data
            for host in ("other.test", "127.0.0.1"):
                with pytest.raises(InvalidRequestError, match=r"no connection to .*certificate"):
                    await load(media, f"https://{host}:{port}/")
        server.close()
        await server.wait_closed()

    asyncio.run(check())


def test_files_below_an_allowed_directory_are_read(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(image())
    (tmp_path / "link.png").symlink_to(tmp_path / "a b.png")

    async def check() -> None:
        async with media_with(paths=(str(tmp_path),)) as media:
            for name in ("a%20b.png", "link.png", "x/../a%20b.png"):
                assert (await load(media, f"file://{tmp_path}/{name}"))[0].data == image()

    asyncio.run(check())


def test_a_link_that_appears_after_the_check_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.png").write_bytes(image())
    (tmp_path / "images").symlink_to(tmp_path / "secret")
    (tmp_path / "x.png").symlink_to(tmp_path / "secret" / "x.png")

    async def check() -> None:
        async with media_with(paths=(str(tmp_path),)) as media:
            for path, why in (("images/x.png", "changed its place"), ("x.png", "cannot be read")):
                monkeypatch.setattr(AllowedPaths, "to_fetch", lambda *_, at=path: str(tmp_path / at))
                with pytest.raises(InvalidRequestError, match=why):
                    await load(media, f"file://{tmp_path}/{path}")

    asyncio.run(check())
