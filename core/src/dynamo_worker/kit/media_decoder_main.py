"""The program of a process that decodes images: ``python -m dynamo_worker.kit.media_decoder_main DESCRIPTOR PARENT``.

Decoders of image formats have had holes, and a small file can ask for hours and for all memory. Here they can do so
without harm: the process has little memory, no secrets of a request but one, and is killed when it takes too long. It
reads jobs from a socket, each one message with descriptors of files in memory: the image as it came, and in the second
step the place for its pixels. :mod:`dynamo_worker.kit.media_decoders` has the other end.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import resource
import signal
import socket
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from PIL import Image

#: The formats that are decoded: Pillow's names. Of the JPEGs that phones write into one file (MPO) the first counts.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
ACCEPTED: Final = "PNG, JPEG, WebP or GIF"
#: Longest message between this process and the worker, in bytes.
MESSAGE_BYTES: Final = 4096
#: Bytes per pixel that decoding takes at most: the canvas of a decoder twice, and the image in two modes, four bytes
#: each, and the result.
_PIXEL_BYTES: Final = 20
_MORE_BYTES: Final = 192 * 2**20
#: Rows that are converted at once.
_ROWS: Final = 256
#: Longest reason that is passed on, in characters.
_REASON_CHARACTERS: Final = 200
#: What a file is that is no image of ours, by its first bytes (spaces skipped, lower case), for the message.
_OTHERS: Final = (
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML document, perhaps an SVG drawing"),
    (b"{", "a JSON document"),
    (b"%pdf", "a PDF document"),
    (b"%!ps", "a PostScript document"),
    (b"ii*\0", "a TIFF image"),
    (b"mm\0*", "a TIFF image"),
    (b"ii+\0", "a BigTIFF image"),
    (b"mm\0+", "a BigTIFF image"),
    (b"bm", "a BMP image"),
    (b"8bps", "a Photoshop image"),
    (b"\0\0\1\0", "an icon"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"pk\3\4", "a ZIP archive"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL image"),
    (b"\0\0\0\x0cjp  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"#exr", "an EXR image"),
)


class RefusalError(Exception):
    """Why an image is not decoded: completes "image 2 of 3 (https://host/path): "."""


def describe_content(data: bytes | mmap.mmap) -> str | None:
    """Return what a file is that is not an accepted image, as far as its first bytes tell."""
    head = bytes(data[:512]).lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    for beginning, name in _OTHERS:
        if head.startswith(beginning):
            return name
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "an AVIF image" if brand in (b"avif", b"avis") else "a HEIC image or an MP4 video"
    if head[:4] == b"riff":
        return "a RIFF file that is no WebP image"
    return None


def _opened(data: mmap.mmap, limits: dict[str, Any]) -> Image.Image:
    """Return an image whose header has been read and is within the limits."""
    from PIL import Image, UnidentifiedImageError

    if (size := _webp_size(data[:30])) is not None:  # opening it makes room for its pixels
        _check_size(*size, limits)
    Image.MAX_IMAGE_PIXELS = max(limits["pixels"] // 2, 1)  # Pillow refuses more than twice of it
    try:
        image = Image.open(data, formats=FORMATS)  # type: ignore[arg-type]
    except UnidentifiedImageError:
        kind = describe_content(data)
        raise RefusalError(f"it is {kind}; expected {ACCEPTED}" if kind else f"it is no valid {ACCEPTED}") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise RefusalError(f"it has {pixels[0] if pixels else 'more'} pixels, {_at_most(limits)}") from None
    _check_size(image.width, image.height, limits)
    return image


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Return width and height from the first 30 bytes of a WebP image, or None if they do not tell."""
    kind = head[12:16]
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _check_size(width: int, height: int, limits: dict[str, Any]) -> None:
    if width * height > limits["pixels"]:
        raise RefusalError(f"it has {width} x {height} pixels, {_at_most(limits)}")
    if width < 1 or height < 1:
        raise RefusalError("it has no pixels")


def _at_most(limits: dict[str, Any]) -> str:
    return f"at most {limits['pixels']} are accepted (--media-max-pixels)"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__


def probe(data: mmap.mmap, limits: dict[str, Any]) -> dict[str, Any]:
    """Return format, width and height of an image.

    :raises RefusalError: it is none, has too many pixels or frames.
    """
    image = _opened(data, limits)
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    most = limits["frames"]
    if kind in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > most:
        raise _too_many_frames(most)
    if kind == "GIF":  # it has no count: a file may have millions of frames
        try:
            image.seek(most)
        except EOFError:
            pass
        else:
            raise _too_many_frames(most)
    return {"format": kind, "width": image.width, "height": image.height}


def _too_many_frames(most: int) -> RefusalError:
    frames = "one frame" if most == 1 else f"{most} frames"
    return RefusalError(f"it is animated and has more than {frames} (--media-max-frames)")


def decode(data: mmap.mmap, limits: dict[str, Any], pixels: mmap.mmap) -> None:
    """Decode an image completely, and write its pixels as RGB.

    :raises RefusalError: it is broken.
    """
    image = _opened(data, limits)
    image.load()
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits, not scale them
        image = image.point(lambda value: value * (1 / 256), "L")
    for top in range(0, image.height, _ROWS):
        rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        pixels.write(rows.convert("RGB").tobytes())


def _answer(job: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    with mmap.mmap(descriptors[0], 0, prot=mmap.PROT_READ) as data:
        try:
            if job["job"] == "probe":
                return probe(data, job)
            with mmap.mmap(descriptors[1], 0) as pixels:
                decode(data, job, pixels)
            return {}
        except RefusalError as error:
            return {"refused": str(error)}
        except MemoryError:
            return {"refused": "decoding it takes more memory than an image of that size may need"}
        except Exception as error:  # whatever Pillow raises for what it cannot read
            return {"refused": f"it is broken: {_reason(error)}"}


def serve(connection: socket.socket) -> None:
    """Answer jobs until the worker closes the connection."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
        if not message:
            return
        try:
            answer = _answer(json.loads(message), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(json.dumps(answer).encode())


def main() -> int:
    """Prepare this process, say so, and serve."""
    if not linux.on_parent_death(signal.SIGKILL, int(sys.argv[2])):
        return 1
    linux.set_name("media-decoder")
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the worker, though a whole group may get them
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    warnings.simplefilter("ignore")
    try:
        from PIL import GifImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401
    except ImportError as error:
        connection.send(json.dumps({"failed": f"Pillow cannot be imported: {_reason(error)}"}).encode())
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + _MORE_BYTES + int(sys.argv[3]) * _PIXEL_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    connection.send(json.dumps({"ready": True}).encode())
    serve(connection)
    return 0


if __name__ == "__main__":
    sys.exit(main())
