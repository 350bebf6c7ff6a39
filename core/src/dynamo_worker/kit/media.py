"""The worker's own media fetch: images that requests name are loaded within limits and decoded before an engine sees them.

An engine's plugin makes one :class:`Media`, and loads the images of each request with :meth:`Media.load`. What is wrong
with an image is the matter of its request: a client gets HTTP 400 that says which image, why, and which limit.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_worker.kit import media_urls
from dynamo_worker.kit.media_addresses import AddressPolicy
from dynamo_worker.kit.media_budget import Budget
from dynamo_worker.kit.media_cache import ImageCache
from dynamo_worker.kit.media_decoders import Decoders, FileInMemory
from dynamo_worker.kit.media_downloads import Downloads, MediaFile, Total
from dynamo_worker.kit.media_urls import MediaError
from dynamo_worker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from PIL import Image

    from dynamo_worker.kit.media_decoders import DecodedImage, Header
    from dynamo_worker.kit.media_requests import MediaReference
    from dynamo_worker.kit.media_settings import MediaSettings

_T = TypeVar("_T")


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

        return Image.frombuffer("RGB", (self.width, self.height), self.pixels, "raw", "RGB", 0, 1)

    def to_numpy(self) -> Any:
        """Return the pixels as a read-only array of bytes, (height, width, 3), without a copy."""
        import numpy as np

        return np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 3)


class Media:
    """Loads the media of one worker's requests."""

    def __init__(self, settings: MediaSettings) -> None:
        """Open and start nothing yet.

        :raises UsageError: a limit makes another one pointless.
        """
        settings.check()
        self._settings = settings
        self._downloads = Downloads(settings, AddressPolicy(settings.networks))
        self._decoders = Decoders(settings)
        self._cache = ImageCache(settings.cache_bytes)
        self._files, self._pixels = Budget(settings.file_memory), Budget(settings.pixel_memory)
        self._loading: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the decoders; without this, the first images wait for it.

        :raises StartError: Pillow is missing, or no process can be started.
        """
        await self._decoders.start()

    def processes(self) -> list[int]:
        """Return the pids of the decoders. They are not the engine's: if one ends, another takes its place."""
        return self._decoders.processes()

    async def close(self) -> None:
        """End all downloads and decoders at once; requests that wait for images migrate."""
        self._closed = True
        loading = list(self._loading)
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await self._downloads.close()
        await self._decoders.close()
        self._cache.clear()

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
        if len(references) > self._settings.max_items:
            raise InvalidRequestError(
                f"the request has {len(references)} images, at most {self._settings.max_items} are accepted "
                "(--media-max-items)"
            )
        async with contextlib.AsyncExitStack() as stack:
            loading = _Loading(self, references, scope, stack)
            yield await loading.result()
