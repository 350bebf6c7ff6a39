"""Downloads over HTTP from hosts that nobody vouches for: every hop, address, header and byte is checked.

No proxy of the environment is used: a proxy looks names up itself, so no address could be checked here.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from dynamo_worker import __version__
from dynamo_worker.errors import describe
from dynamo_worker.kit import media_urls
from dynamo_worker.kit.media_urls import MediaError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from yarl import URL

    from dynamo_worker.kit.media_addresses import AddressPolicy
    from dynamo_worker.kit.media_settings import MediaSettings
    from dynamo_worker.kit.media_threads import WaitingThreads

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # nothing that is sent can grow here
    "User-Agent": f"dynamo-worker/{__version__}",
}
#: Bytes that are read ahead of whoever takes them, for each download.
_READ_AHEAD: Final = 64 * 1024
#: Most headers of a response, and longest line of its head.
_MOST_HEADERS: Final = 100
_LINE_BYTES: Final = 8190
#: Most addresses of a host that are tried.
_MOST_ADDRESSES: Final = 8


class _AddressError(OSError):
    """An address that media must not come from."""


class _Resolver(AbstractResolver):
    """Looks names up, and refuses those of which any address is refused."""

    def __init__(self, policy: AddressPolicy, threads: WaitingThreads, limit: float) -> None:
        self._policy, self._threads, self._limit = policy, threads, limit

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        try:
            found = await self._threads.call(
                socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, limit=self._limit
            )
        except asyncio.TimeoutError:
            raise _AddressError(
                f"its name was not looked up within {self._limit:g} s (--media-connect-timeout)"
            ) from None
        except (OSError, UnicodeError) as error:
            raise _AddressError(f"its name cannot be looked up: {describe(error)}") from None
        addresses = list(dict.fromkeys((kind, str(place[0])) for kind, _, _, _, place in found))
        for _, address in addresses:
            check_address(self._policy, address)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=kind,
                proto=0,
                flags=int(socket.AI_NUMERICHOST | socket.AI_NUMERICSERV),
            )
            for kind, address in addresses[:_MOST_ADDRESSES]
        ]

    async def close(self) -> None:
        """Do nothing: threads end by themselves."""


def check_address(policy: AddressPolicy, address: str) -> None:
    """Check that media may come from an address.

    :raises OSError: they may not; the message completes "the host: ".
    """
    why = policy.refusal(address)
    if why is not None:
        raise _AddressError(f"its address {address} is not public ({why}); --media-allow-network allows a network")


class HttpFetcher:
    """The HTTP client of one worker."""

    def __init__(self, settings: MediaSettings, policy: AddressPolicy, threads: WaitingThreads) -> None:
        """Open nothing yet.

        :param threads: for lookups of names.
        """
        self._settings, self._policy, self._threads = settings, policy, threads
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None

    def _open_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """Check the address once more, whoever has looked it up: this one is connected to."""
        family, kind, protocol, _, place = address
        check_address(self._policy, str(place[0]))
        return socket.socket(family, kind, protocol)

    async def _client(self) -> aiohttp.ClientSession:
        if self._tls is None:  # reads all certificates of the system
            self._tls = await self._threads.call(ssl.create_default_context, limit=self._settings.timeout)
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_Resolver(self._policy, self._threads, self._settings.connect_timeout),
                socket_factory=self._open_socket,
                use_dns_cache=False,
                # No host may prepare an answer for somebody else's request, nor keep descriptors.
                force_close=True,
                limit=0,  # `fetches` limits them
                ssl=self._tls,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout),
                read_bufsize=_READ_AHEAD,
                max_line_size=_LINE_BYTES,
                max_field_size=_LINE_BYTES,
                max_headers=_MOST_HEADERS,
            )
        return self._session

    async def fetch(self, text: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Download from a URL.

        :param take: called with each part of the content; may raise.
        :raises MediaError: the URL or what the server does is refused.
        """
        url = media_urls.http_url(text, self._settings.hosts)
        for _ in range(self._settings.max_redirects + 1):
            target = await self._one(url, take)
            if target is None:
                return
            url = self._next(url, target)
        raise MediaError(f"more than {self._settings.max_redirects} redirects (--media-max-redirects)")

    def _next(self, url: URL, target: str) -> URL:
        try:
            joined = str(url.join(type(url)(target)))
        except (ValueError, UnicodeError):
            raise MediaError("the server redirects to a URL that is not valid") from None
        try:
            return media_urls.http_url(joined if "://" not in target else target, self._settings.hosts)
        except MediaError as error:
            raise MediaError(f"a redirect to {media_urls.shown(target)}: {error}") from None

    async def _one(self, url: URL, take: Callable[[bytes], Awaitable[None]]) -> str | None:
        """Make one request, and return where it is redirected to, or None if the content was taken."""
        host = url.raw_host or ""
        try:
            if media_urls.is_address(host):  # the client looks no such host up
                check_address(self._policy, host)
            client = await self._client()
            async with client.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    location = response.headers.get("Location", "")
                    if not location:
                        raise MediaError(f"the server answered {response.status} without a place to go to")
                    return location
                self._check_head(response)
                async for part in response.content.iter_any():
                    await take(part)
                return None
        except _AddressError as error:
            raise MediaError(f"the host {host[:80]}: {error}") from None
        except aiohttp.ClientConnectorError as error:
            cause: BaseException = error.os_error
            if isinstance(cause, _AddressError):
                raise MediaError(f"the host {host[:80]}: {cause}") from None
            raise MediaError(f"no connection to {host[:80]}: {describe(cause)[:200]}") from None
        except asyncio.TimeoutError:
            limit = f"{self._settings.connect_timeout:g} s (--media-connect-timeout)"
            raise MediaError(f"no connection to {host[:80]} within {limit}") from None
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError, ValueError) as error:
            raise MediaError(f"the server's answer is broken: {describe(error)[:200]}") from None

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            raise MediaError(f"the server answered {response.status}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise MediaError(f"the server compressed it ({encoding[:40]}) although it was asked not to")
        declared = response.content_length
        if declared is not None and declared > self._settings.max_bytes:
            raise too_large(self._settings, declared)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


def too_large(settings: MediaSettings, size: int | None = None) -> MediaError:
    """Return the error for a file that is too large.

    :param size: of the file in bytes; None if only known to be more than the limit.
    """
    most = f"at most {settings.max_bytes} are accepted (--media-max-item-mib)"
    return MediaError(f"it has {size} bytes, {most}" if size is not None else f"it has more bytes than fit: {most}")
