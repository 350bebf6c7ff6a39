"""The URLs of media: what is accepted, how they are shown, and the content of ``data:`` URLs."""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import re
from typing import TYPE_CHECKING, Final

from yarl import URL

from dynamo_worker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

#: Longest URL that is no ``data:`` URL, in characters.
_MOST_CHARACTERS: Final = 8192
#: Longest part of a URL in a message, and longest description of a ``data:`` URL's content.
_SHOWN_CHARACTERS: Final = 80
_TYPE_CHARACTERS: Final = 40
#: Longest beginning of a ``data:`` URL, before the comma.
_HEADER_CHARACTERS: Final = 256
#: Characters of base64 that are decoded at once on the event loop (0.5 ms); a multiple of four.
_STEP: Final = 2**19
_HOST: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
#: The last part of a name that a resolver may take for an IPv4 address: 2130706433, 0x7f000001, 127.1, 0177.0.0.1.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f\\]")


class MediaError(Exception):
    """Why one item cannot be loaded: completes "image 2 of 3 (https://host/path): "."""


def shown(url: str) -> str:
    """Return a URL for messages and logs: short, without credentials, query and fragment, which may hold secrets."""
    scheme, colon, rest = url[:_MOST_CHARACTERS].partition(":")
    if not colon:
        return "not a URL"
    if scheme.lower() == "data":
        kind = re.split(r"[;,]", rest, maxsplit=1)[0][:_TYPE_CHARACTERS]
        return _printable(f"data:{kind}, {len(url)} characters")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    slashes, place = rest[:2], rest[2:]
    if slashes != "//":
        return _printable(f"{scheme[:20]}:{rest}"[:_SHOWN_CHARACTERS])
    authority, slash, path = place.partition("/")
    text = f"{scheme[:20]}://{authority.rpartition('@')[2].rpartition(chr(92))[2]}{slash}{path}"
    return _printable(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case.

    :raises MediaError: it has none, or one that no media come by.
    """
    scheme, colon, _ = url[:32].partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in ("http", "https", "data", "file"):
        found = f"{scheme[:20]}:" if colon else "no scheme"
        raise MediaError(f"expected a URL with https:, http: or data:, got {_printable(found)}")
    return scheme


def http_url(text: str, hosts: Sequence[str] = ()) -> URL:
    """Read a URL to fetch from.

    Whatever two readers might understand differently is refused: the reader of this function decides, and it is the
    one that the HTTP client has.

    :param hosts: the only hosts that are allowed; ``.example.com`` stands for all below it. Empty allows all.
    :raises MediaError: it is not valid or not allowed.
    """
    if len(text) > _MOST_CHARACTERS:
        raise MediaError(f"the URL has {len(text)} characters, at most {_MOST_CHARACTERS} are accepted")
    if _UNSAFE.search(text):
        raise MediaError("the URL has a space, a control character or a backslash")
    authority = re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]
    if "@" in authority:
        raise MediaError("credentials in a URL are refused")
    if "%" in authority:
        raise MediaError("a percent sign in the host of a URL is refused")
    try:
        url = URL(text)
        host, port = url.raw_host, url.port
    except (ValueError, UnicodeError):
        raise MediaError("the URL is not valid") from None
    if url.scheme not in ("http", "https"):
        raise MediaError("a redirect leads to a URL that is neither https: nor http:")
    if not host or not port:
        raise MediaError("the URL has no host" if not host else "the URL has port 0")
    host = host.lower()
    if "[" in authority and ":" not in host:
        raise MediaError("the host of the URL is in brackets, but no address of IPv6")
    _check_host(host)
    if hosts and not any(_matches(host.rstrip("."), allowed) for allowed in hosts):
        raise MediaError("this worker does not fetch from that host (--media-allow-host)")
    return url.with_fragment(None)


def _check_host(host: str) -> None:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise MediaError("the host of the URL is not a valid address") from None
        return
    name = host.removesuffix(".")
    if not _HOST.fullmatch(name) or len(name) > 253:
        raise MediaError("the host of the URL is not a valid name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise MediaError("the host of the URL is a number, but not an address such as 192.0.2.1") from None


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


def is_address(host: str) -> bool:
    """Return whether the host of a checked URL is an address, not a name."""
    return ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def data_payload(url: str) -> tuple[int, int]:
    """Return where the base64 of a ``data:`` URL begins, and how many bytes it stands for at most.

    :raises MediaError: it has no base64.
    """
    comma = url.find(",", 0, _HEADER_CHARACTERS)
    if comma < 0:
        raise MediaError("the data URL is not valid: expected data:image/png;base64,…")
    if not url[:comma].lower().endswith(";base64"):
        raise MediaError("the data URL is not base64: expected data:image/png;base64,…")
    return comma + 1, (len(url) - comma - 1) * 3 // 4


async def data_chunks(url: str) -> AsyncIterator[bytes]:
    """Decode the base64 of a ``data:`` URL in steps between which the event loop goes on.

    :raises MediaError: it is not valid base64.
    """
    begin, _ = data_payload(url)
    rest = ""
    for at in range(begin, len(url), _STEP):
        text = rest + url[at : at + _STEP]
        for blank in "\n\r \t":  # mail programs break lines
            text = text.replace(blank, "")
        last = at + _STEP >= len(url)
        whole = len(text) if last else len(text) // 4 * 4
        text, rest = text[:whole], text[whole:]
        yield _decoded(text, last=last)
        await asyncio.sleep(0)


def _decoded(text: str, *, last: bool) -> bytes:
    if len(text) % 4:
        raise MediaError("the data URL ends within its base64: its length is not a multiple of four")
    body = text.rstrip("=") if last else text
    if len(text) - len(body) > 2 or not _BASE64.fullmatch(body):
        raise MediaError("the data URL is not valid base64")
    try:
        return binascii.a2b_base64(text)
    except ValueError:
        raise MediaError("the data URL is not valid base64") from None


_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*")


def refused(name: str, url: str, why: object) -> InvalidRequestError:
    """Return the error for an item that cannot be loaded.

    :param name: of the item, such as ``image 2 of 3``.
    """
    return InvalidRequestError(f"{name} ({shown(url)}): {why}")
