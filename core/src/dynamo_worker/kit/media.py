"""The worker's own media fetch: images that requests name are loaded and decoded within limits.

An engine's plugin makes one :class:`Media`, and loads the images of each request with :meth:`Media.load`. What is wrong
with an image is the matter of its request: a client gets HTTP 400 that says which image, why, and which limit.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from dynamo_worker.errors import InvalidRequestError, StartError
from dynamo_worker.kit import media_urls
from dynamo_worker.kit.media_addresses import AddressPolicy
from dynamo_worker.kit.media_budget import Budget, NoRoomError
from dynamo_worker.kit.media_cache import ImageCache
from dynamo_worker.kit.media_decoders import Decoders, FileInMemory
from dynamo_worker.kit.media_downloads import Downloads, MediaFile, Total
from dynamo_worker.kit.media_urls import MediaError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from PIL import Image

    from dynamo_worker.kit.media_budget import Share
    from dynamo_worker.kit.media_decoders import DecodedImage, Header
    from dynamo_worker.kit.media_requests import MediaReference
    from dynamo_worker.kit.media_settings import MediaSettings

_T = TypeVar("_T")

#: Memory that a file gets before its size is known, in bytes.
_FIRST_BYTES: Final = 512 * 1024


@dataclass(frozen=True)
class LoadedImage:
    """One image of a request. Requests may share its pixels; nobody can change them.

    :param hash: SHA-256 of the file, 64 hexadecimal digits: the same wherever the image comes from.
    :param data: the file as it came; it has been decoded completely once.
    :param format: ``PNG``, ``JPEG``, ``WEBP`` or ``GIF``.
    :param width: in pixels.
    :param height: in pixels.
    :param pixels: red, green and blue of each pixel, the top row first; 3 * width * height bytes.
    """

    hash: str
    data: bytes
    format: str
    width: int
    height: int
    pixels: memoryview

    def to_pil(self) -> Image.Image:
        """Return a copy for Pillow, in mode RGB. Takes a millisecond per million pixels: call it in a thread."""
        from PIL import Image

        return Image.frombuffer("RGB", (self.width, self.height), self.pixels, "raw", "RGB", 0, 1)  # type: ignore[arg-type]

    def to_numpy(self) -> Any:
        """Return the pixels as a read-only array of bytes, (height, width, 3), without a copy."""
        import numpy as np

        return np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 3)


class _Parts(NamedTuple):
    """What loading images takes."""

    settings: MediaSettings
    downloads: Downloads
    decoders: Decoders
    cache: ImageCache
    files: Budget
    pixels: Budget


class Media:
    """Loads the media of one worker's requests."""

    def __init__(self, settings: MediaSettings) -> None:
        """Open and start nothing yet.

        :raises UsageError: a limit makes another one pointless.
        """
        settings.check()
        self._parts = _Parts(
            settings,
            Downloads(settings, AddressPolicy(settings.networks)),
            Decoders(settings),
            ImageCache(settings.cache_bytes),
            Budget(settings.file_memory),
            Budget(settings.pixel_memory),
        )
        self._loading: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the decoders; without this, the first images wait for it.

        :raises StartError: Pillow is missing, or no process can be started.
        """
        await self._parts.decoders.start()

    def processes(self) -> list[int]:
        """Return the pids of the decoders. They are not the engine's: if one ends, another takes its place."""
        return self._parts.decoders.processes()

    async def close(self) -> None:
        """End all downloads and decoders at once; requests that wait for images migrate."""
        self._closed = True
        loading = list(self._loading)
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await self._parts.downloads.close()
        await self._parts.decoders.close()
        self._parts.cache.clear()

    @contextlib.asynccontextmanager
    async def load(
        self, references: Sequence[MediaReference], *, scope: str | None = None
    ) -> AsyncIterator[list[LoadedImage]]:
        """Load the images that a request names. They count as memory in use until the block ends.

        A task that is cancelled gives up its downloads and decoders at once.

        :param references: see :func:`dynamo_worker.kit.media_requests.images`.
        :param scope: requests with different scopes share neither downloads nor cached images.
        :raises InvalidRequestError: an image cannot be loaded; the message says which one and why.
        :raises WorkerUnavailable: there is no room for the images in time, or this worker stops.
        """
        if not references:
            yield []
            return
        if self._closed:
            raise _unavailable("it stops")
        if len(references) > self._parts.settings.max_items:
            raise InvalidRequestError(
                f"the request has {len(references)} images, at most {self._parts.settings.max_items} are accepted "
                "(--media-max-items)"
            )
        async with contextlib.AsyncExitStack() as stack:
            yield await self._result(_Loading(self._parts, references, scope, stack))

    async def _result(self, loading: _Loading) -> list[LoadedImage]:
        """Wait for the images, for a limited time, and leave nothing running."""
        task = asyncio.ensure_future(loading.images())
        self._loading.add(task)
        try:
            await asyncio.wait({task}, timeout=self._parts.settings.timeout)
        finally:
            self._loading.discard(task)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled():
            return task.result()
        if self._closed:
            raise _unavailable("it stops")
        raise loading.late()


class _Loading:
    """How the images of one request are loaded: all files first, then all headers, then all pixels.

    In between it waits for memory, for all its images at once.
    """

    def __init__(
        self,
        parts: _Parts,
        references: Sequence[MediaReference],
        scope: str | None,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        """Begin with nothing.

        :param stack: ends the memory's use.
        """
        self._parts, self._references, self._scope, self._stack = parts, references, scope, stack
        self._missing = {reference.number: reference for reference in references}
        self._waits: dict[int, str] = {}

    async def images(self) -> list[LoadedImage]:
        """Load the images.

        :raises InvalidRequestError: one cannot be loaded.
        :raises WorkerUnavailable: this worker has no room for them.
        """
        try:
            memory = await self._memory(self._parts.files, _FIRST_BYTES * len(self._references))
            total = Total(self._parts.settings.max_request_bytes, memory)
            files = await _all([self._file(reference, total) for reference in self._references])
            decoded = await self._decoded(files)
        except NoRoomError:
            raise _unavailable("it has no memory for more media (--media-memory-mib)") from None
        except StartError as error:
            raise _unavailable(str(error.args[0])) from None
        return [_loaded(file, decoded[file.hash]) for file in files]

    def late(self) -> Exception:
        """Return the error for images that were not loaded in time."""
        limit = f"within {self._parts.settings.timeout:g} s (--media-timeout)"
        if self._waits:
            return _unavailable(f"it had no room for media {limit}: all waited for {min(self._waits.values())}")
        reference = self._missing[min(self._missing)]
        return media_urls.refused(reference.name, reference.url, f"it was not loaded {limit}")

    async def _memory(self, budget: Budget, amount: int) -> Share:
        self._waits[0] = "memory (--media-memory-mib)"
        share = await self._stack.enter_async_context(budget.share(min(amount, budget.most)))
        del self._waits[0]
        return share

    async def _file(self, reference: MediaReference, total: Total) -> MediaFile:
        with self._refusing(reference):
            file = await self._parts.downloads.get(reference.url, self._scope, total, self._waiting(reference))
            if not file.data:
                raise MediaError("it is empty")
            return file

    async def _decoded(self, files: Sequence[MediaFile]) -> dict[str, DecodedImage]:
        """Return the decoded images by the hashes of their files."""
        found: dict[str, DecodedImage] = {}
        new: dict[str, _Item] = {}
        for reference, file in zip(self._references, files, strict=True):
            if file.hash in found or file.hash in new:
                continue
            image = self._parts.cache.get(self._scope, file.hash)
            if image is None:
                new[file.hash] = _Item(reference, file, self._stack.enter_context(contextlib.closing(FileInMemory())))
            else:
                found[file.hash] = image
        headers = await _all([self._header(item) for item in new.values()])
        size = sum(header.size for header in headers)
        if size > self._parts.pixels.most:
            raise InvalidRequestError(
                f"the images of this request have {size} bytes when decoded, at most {self._parts.pixels.most} are "
                "accepted (three quarters of --media-memory-mib)"
            )
        await self._memory(self._parts.pixels, size)
        images = await _all([self._image(item, header) for item, header in zip(new.values(), headers, strict=True)])
        for key, image in zip(new, images, strict=True):
            self._parts.cache.put(self._scope, key, image)
        return {**found, **dict(zip(new, images, strict=True))}

    async def _header(self, item: _Item) -> Header:
        with self._refusing(item.reference):
            await item.copy.write(item.file.data)
            return await self._parts.decoders.probe(item.copy, self._waiting(item.reference))

    async def _image(self, item: _Item, header: Header) -> DecodedImage:
        with self._refusing(item.reference):
            image = await self._parts.decoders.decode(item.copy, header, self._waiting(item.reference))
        self._missing.pop(item.reference.number)
        return image

    def _waiting(self, reference: MediaReference) -> Callable[[str | None], None]:
        def waits(what: str | None) -> None:
            if what is None:
                self._waits.pop(reference.number, None)
            else:
                self._waits[reference.number] = what

        return waits

    @staticmethod
    @contextlib.contextmanager
    def _refusing(reference: MediaReference) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            raise media_urls.refused(reference.name, reference.url, error) from None


class _Item(NamedTuple):
    """An image that is to be decoded.

    :param reference: the first of the request that stands for it.
    :param copy: where the decoder reads the file.
    """

    reference: MediaReference
    file: MediaFile
    copy: FileInMemory


def _loaded(file: MediaFile, image: DecodedImage) -> LoadedImage:
    header = image.header
    return LoadedImage(file.hash, file.data, header.format, header.width, header.height, image.pixels)


def _unavailable(why: str) -> Exception:
    from dynamo.llm.exceptions import WorkerUnavailable

    return WorkerUnavailable(f"this worker cannot load the media: {why}")


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Return all results; after the first failure, cancel the rest and raise that of the first in order."""
    tasks = [asyncio.ensure_future(one) for one in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return [task.result() for task in tasks]
