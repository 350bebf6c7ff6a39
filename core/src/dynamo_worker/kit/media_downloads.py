"""The files of media, from wherever they come: one download for all who want the same URL at the same time.

A download ends when nobody wants it any more. Nothing is kept after it: what a URL stands for is asked again each time.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

from dynamo_worker.kit import media_files, media_urls
from dynamo_worker.kit.media_budget import NoRoomError
from dynamo_worker.kit.media_http import HttpFetcher, too_large
from dynamo_worker.kit.media_settings import FILE_COPIES
from dynamo_worker.kit.media_threads import WaitingThreads
from dynamo_worker.kit.media_urls import MediaError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dynamo_worker.kit.media_addresses import AddressPolicy
    from dynamo_worker.kit.media_budget import Share
    from dynamo_worker.kit.media_settings import MediaSettings

#: Bytes that are hashed at once on the event loop.
_STEP: Final = 2**18


class MediaFile(NamedTuple):
    """A file as it came.

    :param hash: SHA-256 of its content, 64 hexadecimal digits.
    """

    data: bytes
    hash: str


class Total:
    """The bytes of one request's files, as they arrive."""

    def __init__(self, most: int, memory: Share) -> None:
        """Start with none.

        :param memory: what the request has; it grows as needed.
        """
        self._taken, self._most, self._memory = 0, most, memory

    def add(self, amount: int) -> None:
        """Count bytes.

        :raises MediaError: they are more than a request may have.
        :raises NoRoomError: this worker has no memory for them.
        """
        self._taken += amount
        if self._taken > self._most:
            raise MediaError(
                f"the files of this request have more than {self._most} bytes together (--media-max-request-mib)"
            )
        missing = self._taken * FILE_COPIES - self._memory.amount
        if missing > 0:
            self._memory.grow(missing)


class Downloads:
    """All downloads of one worker."""

    def __init__(self, settings: MediaSettings, policy: AddressPolicy) -> None:
        self._settings = settings
        self._threads = WaitingThreads()
        self._http = HttpFetcher(settings, policy, self._threads)
        self._places = asyncio.Semaphore(settings.fetches)
        self._shared: dict[tuple[str | None, str], _Download] = {}

    async def get(self, url: str, scope: str | None, total: Total, waits: Callable[[str | None], None]) -> MediaFile:
        """Return the file that a URL stands for.

        :param scope: who may share a download: requests with the same scope.
        :param total: of the request.
        :param waits: called with what this waits for beside the server, and with None when it goes on.
        :raises MediaError: it cannot be loaded.
        :raises NoRoomError: this worker has no memory for it.
        """
        scheme = media_urls.scheme_of(url)
        if scheme == "data":
            return await self._inline(url, total)
        key = (scope, url)
        download = self._shared.get(key)
        if download is None or download.ended:
            fetch = self._from_file if scheme == "file" else self._http.fetch
            download = self._shared[key] = _Download(lambda take: fetch(url, take), self._places, self._settings)
            download.task.add_done_callback(lambda _: self._forget(key))
        return await download.wanted(total, waits)

    def _forget(self, key: tuple[str | None, str]) -> None:
        if key in self._shared and self._shared[key].ended:
            del self._shared[key]

    async def _inline(self, url: str, total: Total) -> MediaFile:
        size = media_urls.data_payload(url)[1]
        if size > self._settings.max_bytes + 2:  # the last four characters may stand for two bytes less
            raise too_large(self._settings, size)
        parts, digest = [], hashlib.sha256()
        async for part in media_urls.data_chunks(url):
            parts.append(part)
            digest.update(part)
        data = b"".join(parts)
        if len(data) > self._settings.max_bytes:
            raise too_large(self._settings, len(data))
        total.add(len(data))
        return MediaFile(data, digest.hexdigest())

    async def _from_file(self, url: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            content = await self._threads.call(media_files.read, url, self._settings, limit=self._settings.timeout)
        except asyncio.TimeoutError:
            raise MediaError(f"the file was not read within {self._settings.timeout:g} s (--media-timeout)") from None
        for at in range(0, len(content), _STEP):
            await take(content[at : at + _STEP])
            await asyncio.sleep(0)

    async def close(self) -> None:
        """End all downloads."""
        tasks = [download.task for download in self._shared.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()


class _Download:
    """One download and those who want it.

    :ivar task: the download.
    :ivar ended: whether it is too late to want it.
    """

    def __init__(
        self,
        fetch: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]],
        places: asyncio.Semaphore,
        settings: MediaSettings,
    ) -> None:
        self._fetch, self._places, self._settings = fetch, places, settings
        self._wanted: dict[asyncio.Future[MediaFile], Total] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._digest = hashlib.sha256()
        self.ended = False
        self.task = asyncio.ensure_future(self._run())

    async def wanted(self, total: Total, waits: Callable[[str | None], None]) -> MediaFile:
        """Return the file; whoever stops waiting for it does not end the download for others."""
        file: asyncio.Future[MediaFile] = asyncio.get_running_loop().create_future()
        self._wanted[file] = total
        if self._places.locked() and not self._parts:
            waits(f"one of {self._settings.fetches} downloads (--media-fetches)")
        try:
            total.add(self._size)
            return await file
        finally:
            waits(None)
            self._leave(file)

    def _leave(self, file: asyncio.Future[MediaFile]) -> None:
        self._wanted.pop(file, None)
        if not self._wanted:
            self.ended = True
            self.task.cancel()

    async def _take(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._settings.max_bytes:
            raise too_large(self._settings)
        for file, total in list(self._wanted.items()):
            _count(file, total, len(part))
        self._digest.update(part)
        self._parts.append(part)

    async def _run(self) -> None:
        try:
            async with self._places:
                await self._fetch(self._take)
            self._finish(MediaFile(b"".join(self._parts), self._digest.hexdigest()))
        except MediaError as error:
            self._finish(error)
        except asyncio.CancelledError:
            for file in self._wanted:
                file.cancel()
            raise
        except BaseException as error:
            self._finish(error)
        finally:
            self.ended = True
            self._parts.clear()

    def _finish(self, result: MediaFile | BaseException) -> None:
        self.ended = True
        for file in self._wanted:
            if file.done():
                continue
            if isinstance(result, BaseException):
                file.set_exception(result)
            else:
                file.set_result(result)


def _count(file: asyncio.Future[MediaFile], total: Total, amount: int) -> None:
    """Count what has arrived for one of those who want the file; whoever must not have it gets an error."""
    try:
        total.add(amount)
    except (MediaError, NoRoomError) as error:
        if not file.done():
            file.set_exception(error)
