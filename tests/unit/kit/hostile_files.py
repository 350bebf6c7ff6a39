"""Files that ask for trouble in place of an image, and some that are fine."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator


def image(kind: str = "PNG", size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    """Return a small image of noise, so that no format makes it trivial."""
    noise = random.Random(7).randbytes(size[0] * size[1] * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", size, noise).save(file, kind, **options)
    return file.getvalue()


def animation(kind: str, frames: int, size: tuple[int, int] = (8, 8)) -> bytes:
    colors = [(99 * index % 256, index // 256 % 256, 7) for index in range(frames)]
    images = [Image.new("RGB", size, color) for color in colors]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2, data: bytes | None = None) -> bytes:
    """Return a PNG of zeros, or with other content than its header says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    if data is None:
        row = (width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] * depth + 7) // 8 + 1
        data = zlib.compress(bytes(row * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Return what decompresses to so many zeros."""
    packer, parts = zlib.compressobj(9), []
    for _ in range(size // 2**20):
        parts.append(packer.compress(bytes(2**20)))
    return b"".join([*parts, packer.flush()])


def gif(width: int, height: int, frames: int = 1, frame: tuple[int, int] = (1, 1), data: bytes = b"") -> bytes:
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02" + (data or b"\x02\x44\x01\x00")
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + one * frames + b"\x3b"


def jpeg_of(width: int, height: int) -> bytes:
    """Return a JPEG whose header says another size than its data have."""
    data = bytearray(image("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_many_scans(scans: int, size: int = 2000) -> bytes:
    """Return a small progressive JPEG that takes minutes: its last scan comes again and again."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (9, 9, 9)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def webp(chunk_kind: bytes, payload: bytes) -> bytes:
    body = b"WEBP" + chunk_kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def broken(data: bytes, at: float = 0.6) -> bytes:
    """Return a file with sixteen bytes that make no sense."""
    place = int(len(data) * at)
    return data[:place] + b"\xff\x00\xaa\x55" * 4 + data[place + 16 :]


def _bombs() -> Iterator[tuple[str, bytes, str]]:
    pixels, frames = "--media-max-pixels", "--media-max-frames"
    yield "PNG of 2.5 gigapixels", png(50_000, 50_000, depth=1, color=0, data=zlib.compress(bytes(2**20))), pixels
    yield "PNG of 900 megapixels", png(30_000, 30_000, data=zeros(2**24)), pixels
    yield "PNG of one row, 2^31 - 1 wide", png(2**31 - 1, 1, data=b"x"), pixels
    yield "PNG of 2^31 - 1 squared", png(2**31 - 1, 2**31 - 1, data=b"x"), pixels
    yield "PNG one pixel too large", png(2001, 2000, data=b"x"), pixels
    yield "PNG of 2^32 - 1 squared", png(2**32 - 1, 2**32 - 1, data=b"x"), ""
    yield "PNG without width", png(0, 10, data=b"x"), ""
    yield "PNG without height", png(10, 0, data=b"x"), ""
    yield "PNG, compressed text of 64 MB", png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(2**26))), ""
    yield "PNG, international text of 64 MB", png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(2**26))), ""
    yield "PNG, color profile of 64 MB", png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(2**26))), ""
    yield (
        "PNG, many texts",
        png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))] * 100),
        "",
    )
    yield "PNG, animated", animation("PNG", 3), frames
    yield "PNG, 2^31 frames", png(8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), ""
    yield "GIF of 4 gigapixels", gif(65_535, 65_535, frame=(65_535, 65_535)), pixels
    yield "GIF with a frame larger than itself", gif(8, 8, frame=(65_535, 65_535)), ""
    yield "GIF, animated", animation("GIF", 3), frames
    yield "GIF, 50 000 frames", gif(1, 1, frames=50_000), frames
    yield "GIF without a frame", gif(8, 8, frames=0), ""
    yield "GIF, an endless comment", gif(8, 8, frames=0)[:-1] + b"\x21\xfe" + (b"\xff" + bytes(255)) * 4000, ""
    yield "JPEG of 4 gigapixels", jpeg_of(65_500, 65_500), pixels
    yield "JPEG without width", jpeg_of(0, 10), ""
    yield "WebP of 268 megapixels", webp(b"VP8X", b"\0\0\0\0" + b"\xff\x3f\x00" * 2), pixels
    yield "WebP of 2^48 pixels", webp(b"VP8X", b"\0\0\0\0" + b"\xff\xff\xff" * 2), pixels
    yield "WebP, lossless, of 268 megapixels", webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(40)), pixels
    yield "WebP, animated", animation("WEBP", 3), frames
    size = struct.pack("<HHHIIHHII", 2, 256, 4, 1, 65_535, 257, 4, 1, 65_535)
    yield "TIFF of 4 gigapixels", b"II*\0\x08\0\0\0" + size, "a TIFF image"
    yield "SVG, a billion laughs", b'<!DOCTYPE svg [<!ENTITY a "ha">]><svg>&a;</svg>', ""


def _others() -> Iterator[tuple[str, bytes, str]]:
    yield "TIFF", image("TIFF"), "a TIFF image"
    yield "TIFF, big endian", b"MM\0*\0\0\0\x08" + bytes(40), "a TIFF image"
    yield "BigTIFF", b"II+\0\x08\0\0\0" + bytes(40), "a BigTIFF image"
    yield "BMP", image("BMP"), "a BMP image"
    yield "icon", image("ICO", (32, 32)), "an icon"
    yield "PPM", image("PPM"), "no valid"
    yield "TGA", image("TGA"), "no valid"
    yield "DDS", b"DDS " + bytes(200), "no valid"
    yield "Photoshop", b"8BPS\0\1" + bytes(200), "a Photoshop image"
    yield "JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200), "a JPEG 2000 image"
    yield "JPEG XL", b"\xff\x0a" + bytes(200), "a JPEG XL image"
    yield "AVIF", b"\0\0\0\x20ftypavif" + bytes(200), "an AVIF image"
    yield "HEIC", b"\0\0\0\x20ftypheic" + bytes(200), "a HEIC image"
    yield "MP4", b"\0\0\0\x20ftypisom" + bytes(200), "an MP4 video"
    yield "AVI", b"RIFF\0\1\0\0AVI LIST" + bytes(200), "no WebP image"
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run", "a PostScript document"
    yield "PDF", b"%PDF-1.7\n" + bytes(100), "a PDF document"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "an SVG drawing"
    yield "SVG after a blank", b'\xef\xbb\xbf \n<SVG width="99999999"/>', "an SVG drawing"
    yield "SVG with an external entity", b'<?xml version="1.0"?><!DOCTYPE s SYSTEM "file:///etc/passwd"><svg/>', "SVG"
    yield "SVG, compressed", gzip.compress(b"<svg/>"), "a gzip archive"
    yield "web page", b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"
    yield "JSON", b'{"error": "not found"}', "a JSON document"
    yield "text", b"Not found", "no valid"
    yield "ZIP", b"PK\3\4" + bytes(100), "a ZIP archive"
    yield "gzip bomb", gzip.compress(bytes(2**24)), "a gzip archive"
    yield "program", b"\x7fELF\2\1\1" + bytes(100), "no valid"
    yield "Python pickle", b"\x80\x04cos\nsystem\n(S'id'\ntR.", "no valid"
    yield "zeros", bytes(2**20), "no valid"
    yield "noise", random.Random(3).randbytes(2**20), "no valid"
    yield "one byte", b"\x89", "no valid"
    yield "nothing", b"", "it is empty"


def _damaged() -> Iterator[tuple[str, bytes, str]]:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = image(kind)
        yield f"{kind}, half of it", half(data), ""
        yield f"{kind}, the first 12 bytes", data[:12], ""
        yield f"{kind}, the first 40 bytes", data[:40], ""
        if kind != "WEBP":  # there they are a picture
            yield f"{kind}, zeros after the first 64 bytes", data[:64] + bytes(len(data) - 64), ""
    yield "PNG, a wrong checksum", broken(image("PNG")), ""
    yield "PNG without data", png(8, 8, data=b""), ""
    yield "PNG, data of something else", png(8, 8, data=zlib.compress(b"short")), ""
    yield "PNG, a chunk of 2 GB", image("PNG")[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(99), ""
    yield "PNG, an unknown color type", png(8, 8, color=3, data=b"x").replace(b"\x08\x03\0\0\0", b"\x08\x05\0\0\0"), ""
    yield "PNG, only the signature", b"\x89PNG\r\n\x1a\n", ""
    yield "PNG, signature and zeros", b"\x89PNG\r\n\x1a\n" + bytes(10_000), ""
    yield "JPEG, markers without end", b"\xff\xd8" + b"\xff" * 100_000, ""
    yield "JPEG, comments without end", b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 16, ""
    yield "GIF, only the signature", b"GIF89a", ""
    yield "GIF that is a script", b"GIF89a/*" + bytes(20) + b"*/=alert(1)", ""
    yield "WebP, a size of 4 GB", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(100), ""


#: What must be refused: a name, the file, and words of the reason.
FILES = [*_bombs(), *_others(), *_damaged()]
#: What must be accepted.
FINE = {
    "PNG": image("PNG"),
    "JPEG": image("JPEG"),
    "progressive JPEG": image("JPEG", progressive=True),
    "WebP": image("WEBP"),
    "lossless WebP": image("WEBP", lossless=True),
    "GIF": image("GIF"),
    "the largest": png(2000, 2000),
    "JPEG that is taller than its data": jpeg_of(64, 480),
    "PNG with more data than pixels": png(8, 8, data=zeros(2**26)),
}
