"""The limits of the worker's own media fetch, and the flags that set them.

A plugin whose engine takes images adds the flags; a worker without such an engine does not have them.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dynamo_worker.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MIB: Final = 2**20
#: Bytes of a decoded pixel: red, green and blue.
PIXEL_BYTES: Final = 3
#: How often a file is in memory while it is decoded: as it came, and where a decoder reads it.
FILE_COPIES: Final = 2
#: The part of the memory that is for files as they came; the rest is for decoded images.
_FILES_SHARE: Final = 4
#: What Dynamo's own workers read: switches the checks of addresses off, a directory, the largest file in MB.
_PEER_INTERNAL: Final = "DYN_MM_ALLOW_INTERNAL"
_PEER_PATH: Final = "DYN_MM_LOCAL_PATH"
_PEER_FILE_MB: Final = "DYN_MM_MAX_FILE_SIZE_MB"
_EVERYWHERE: Final = ("0.0.0.0/0", "::/0")
_HOST: Final = re.compile(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class MediaSettings:
    """What the media of requests may cost, and where they may come from.

    :param max_items: most images of a request.
    :param max_bytes: size of the largest file, in bytes.
    :param max_request_bytes: size of all files of a request, in bytes.
    :param timeout: seconds for all media of a request, waits for a free place and decoding included.
    :param connect_timeout: seconds for the lookup of a host's name, and again for a connection with its TLS handshake.
    :param max_redirects: most redirects of an item.
    :param max_pixels: width times height of the largest image.
    :param max_frames: most frames of an animated image; models see the first.
    :param decode_timeout: seconds of one process for reading the header of an image, and again for decoding it.
    :param fetches: most downloads at a time.
    :param decoders: processes that decode, each one image at a time.
    :param memory: bytes of all media in flight: a quarter for files, the rest for decoded images.
    :param cache_bytes: bytes of decoded images that are kept for later requests; 0 keeps none.
    :param hosts: the only hosts to fetch from: names, ``.example.com`` for all below it, addresses. Empty means all.
    :param networks: networks to fetch from although they are not public.
    :param paths: directories below which ``file://`` URLs may point.
    """

    max_items: int = 16
    max_bytes: int = 20 * _MIB
    max_request_bytes: int = 64 * _MIB
    timeout: float = 30.0
    connect_timeout: float = 5.0
    max_redirects: int = 3
    max_pixels: int = 50_000_000
    max_frames: int = 1
    decode_timeout: float = 10.0
    fetches: int = 64
    decoders: int = 2
    memory: int = 2048 * _MIB
    cache_bytes: int = 256 * _MIB
    hosts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    @property
    def file_memory(self) -> int:
        """Bytes of all files in flight."""
        return self.memory // _FILES_SHARE

    @property
    def pixel_memory(self) -> int:
        """Bytes of all decoded images in flight."""
        return self.memory - self.file_memory

    def check(self) -> None:
        """Check that no limit makes another one pointless.

        :raises UsageError: one does.
        """
        if self.max_bytes > self.max_request_bytes:
            raise UsageError(
                f"--media-max-request-mib {self.max_request_bytes / _MIB:g} is less than "
                f"--media-max-item-mib {self.max_bytes / _MIB:g}",
                hint="raise the former or lower the latter",
            )
        if self.max_request_bytes * FILE_COPIES > self.file_memory:
            raise UsageError(
                f"--media-memory-mib {self.memory / _MIB:g}: a quarter of it is for files, which is less than one "
                f"request needs (--media-max-request-mib {self.max_request_bytes / _MIB:g}, {FILE_COPIES} copies each)",
                hint="raise the former or lower the latter",
            )
        if self.max_pixels * PIXEL_BYTES > self.pixel_memory:
            raise UsageError(
                f"--media-memory-mib {self.memory / _MIB:g}: three quarters of it are for decoded images, which is "
                f"less than one image may have (--media-max-pixels {self.max_pixels}, {PIXEL_BYTES} bytes each)",
                hint="raise the former or lower the latter",
            )


class _Flag(NamedTuple):
    """A flag that sets one field.

    :param field: of :class:`MediaSettings`.
    :param read: reads a word of the command line.
    :param unit: what the flag's number is multiplied with.
    """

    name: str
    field: str
    read: Callable[[str], Any]
    metavar: str
    help: str
    unit: int = 1

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"DYN_WORKER_{self.attribute.upper()}"

    @property
    def is_list(self) -> bool:
        return isinstance(_DEFAULTS[self.field], tuple)

    def default(self) -> Any:
        default = _DEFAULTS[self.field]
        return default if self.is_list else default // self.unit if self.unit > 1 else default


def _number(least: float, most: float, *, whole: bool) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value: float = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"expected {kind} from {least:g} to {most:g}, got {text!r}")
        return value

    return read


def _host(text: str) -> str:
    host = text.strip().lower().rstrip(".")
    if _HOST.fullmatch(host):
        return host
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a host such as images.example.com or .example.com, got {text!r}"
        ) from None


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text.strip()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a network such as 10.1.0.0/16: {error}") from None


def _directory(text: str) -> str:
    if not os.path.isabs(text):
        raise argparse.ArgumentTypeError(f"expected an absolute path, got {text!r}")
    return text


_DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(MediaSettings)}
_COUNT: Final = _number(1, 10_000, whole=True)
_SECONDS: Final = _number(0.1, 3600, whole=False)
_SIZE: Final = _number(1, 2**20, whole=True)

_FLAGS: Final = (
    _Flag("media-max-items", "max_items", _COUNT, "N", "Most images of a request."),
    _Flag("media-max-item-mib", "max_bytes", _SIZE, "MIB", "Size of the largest image file.", _MIB),
    _Flag("media-max-request-mib", "max_request_bytes", _SIZE, "MIB", "Size of all files of a request.", _MIB),
    _Flag("media-timeout", "timeout", _SECONDS, "SECONDS", "Time for all media of a request, decoding included."),
    _Flag(
        "media-connect-timeout",
        "connect_timeout",
        _SECONDS,
        "SECONDS",
        "Time for the lookup of a name, and again for a connection.",
    ),
    _Flag("media-max-redirects", "max_redirects", _number(0, 20, whole=True), "N", "Most redirects of an image."),
    _Flag(
        "media-max-pixels",
        "max_pixels",
        _number(1, 2**30, whole=True),
        "N",
        "Width times height of the largest image.",
    ),
    _Flag("media-max-frames", "max_frames", _COUNT, "N", "Most frames of an animated image; the model sees the first."),
    _Flag(
        "media-decode-timeout",
        "decode_timeout",
        _SECONDS,
        "SECONDS",
        "Time for one image in a decoder, which is killed after it.",
    ),
    _Flag("media-fetches", "fetches", _COUNT, "N", "Most downloads at a time."),
    _Flag("media-decoders", "decoders", _number(1, 256, whole=True), "N", "Processes that decode images."),
    _Flag(
        "media-memory-mib",
        "memory",
        _SIZE,
        "MIB",
        "Memory for all media in flight: a quarter for files, the rest for decoded images.",
        _MIB,
    ),
    _Flag(
        "media-cache-mib",
        "cache_bytes",
        _number(0, 2**20, whole=True),
        "MIB",
        "Memory for decoded images that later requests may have again; 0 keeps none.",
        _MIB,
    ),
    _Flag(
        "media-allow-host",
        "hosts",
        _host,
        "HOST",
        "Fetch from this host only; .example.com means all below it (repeatable).",
    ),
    _Flag(
        "media-allow-network",
        "networks",
        _network,
        "CIDR",
        "Fetch from this network although it is not public (repeatable).",
    ),
    _Flag("media-allow-path", "paths", _directory, "DIR", "Directory below which file:// URLs may point (repeatable)."),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a group with the flags ``--media-…``; each has a variable ``DYN_WORKER_MEDIA_…``."""
    group = parser.add_argument_group("media", "where the images of requests may come from, and what they may cost")
    for flag in _FLAGS:
        default = "none" if flag.is_list else str(flag.default()).removesuffix(".0")
        group.add_argument(
            f"--{flag.name}",
            type=flag.read,
            action="append" if flag.is_list else "store",
            metavar=flag.metavar,
            help=f"{flag.help} (env: {flag.variable}; default: {default})",
        )


def from_arguments(args: argparse.Namespace) -> MediaSettings:
    """Return the settings of a command line and the environment; flags take precedence.

    :param args: the values of the flags that :func:`add_flags` has added.
    :raises UsageError: a variable has no valid value, or a limit makes another one pointless.
    """
    values: dict[str, Any] = {}
    for flag in _FLAGS:
        given = getattr(args, flag.attribute)
        if given is None:
            given = _from_environment(flag)
        if given is not None:
            values[flag.field] = tuple(given) if flag.is_list else given * flag.unit
    settings = MediaSettings(**values)
    settings.check()
    return settings


def _from_environment(flag: _Flag) -> Any:
    text = os.environ.get(flag.variable, "").strip()
    if text:
        words = [word.strip() for word in text.split(",") if word.strip()] if flag.is_list else [text]
        values = _read(flag.variable, flag.read, words)
        return values if flag.is_list else values[0]
    if flag.field == "networks" and os.environ.get(_PEER_INTERNAL, "").strip() == "1":
        return _EVERYWHERE
    if flag.field == "paths" and (path := os.environ.get(_PEER_PATH, "").strip()):
        return _read(_PEER_PATH, flag.read, [path])
    if flag.field == "max_bytes" and (size := os.environ.get(_PEER_FILE_MB, "").strip()):
        return _read(_PEER_FILE_MB, flag.read, [size])[0]
    return None


def _read(variable: str, read: Callable[[str], Any], words: Iterable[str]) -> list[Any]:
    try:
        return [read(word) for word in words]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{variable}: {error}") from None
