"""Images in requests, for an engine whose models may take some: whether this worker accepts them, and their loading.

An engine adds :func:`add_flag` and the flags of :mod:`~dynamo_worker.kit.media_settings` to its command line, and
:data:`FIELDS` to its table of requests. It makes one :class:`ImageRequests` and asks it about each request. One without
images costs one look-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import fields, media_requests
from dynamo_worker.kit.engine_arguments import add_switch
from dynamo_worker.kit.media import Media
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from dynamo_worker.kit.media import LoadedImage
    from dynamo_worker.kit.media_requests import MediaReference
    from dynamo_worker.kit.media_settings import MediaSettings

log = get_logger(__name__)

#: The fields of a request about images, all of which :class:`ImageRequests` reads. A client's own ids of its images
#: change nothing: caches go by what is in them.
FIELDS: Final = ("multi_modal_data", "multi_modal_uuids", "image_cache_scope")
#: The flag of Dynamo's own workers with which they accept images.
FLAG: Final = "--enable-multimodal"


def add_flag(group: argparse._ArgumentGroup, variable: str) -> None:
    """Add ``--enable-multimodal``; without it, images are refused.

    :param variable: the environment variable that stands for it.
    """
    add_switch(group, FLAG, variable, "accept images in requests, and load them within the limits of --media-*")


class ImageRequests:
    """What one worker does about the images of its requests."""

    def __init__(self, settings: MediaSettings, *, enabled: bool) -> None:
        """Accept none until :meth:`start`.

        :param enabled: whether the operator wants images.
        """
        self._media = Media(settings)
        self._enabled = enabled
        self._most = 0
        self._model = "the model"

    async def start(self, model: str, most: int) -> None:
        """Begin to accept what the model takes, if the operator wants that.

        :param model: its name, for messages.
        :param most: number of images that it takes in one request; 0 if it takes none.
        :raises StartError: images cannot be loaded here.
        """
        self._model, self._most = model, most
        if self._enabled and not most:
            log.warning("The model takes no images: requests with images are refused", model=model, flag=FLAG)
        if self._enabled and most:
            await self._media.start()

    async def close(self) -> None:
        """Give up all downloads; requests that wait for images migrate."""
        await self._media.close()

    def references(self, request: Mapping[str, Any]) -> Sequence[MediaReference]:
        """Return the images that a request names, in the order of the prompt.

        :raises InvalidRequestError: it names any, and this worker takes none, or not as many; or it names other media.
        """
        if not request.get("multi_modal_data"):
            return ()
        references = media_requests.images(request)
        if references and not self._most:
            raise InvalidRequestError(f"{self._model} takes no images, and the request has {len(references)}")
        if references and not self._enabled:
            raise InvalidRequestError(f"this worker takes no images: it was started without {FLAG}")
        if len(references) > self._most:
            raise InvalidRequestError(
                f"the request has {len(references)} images, and {self._model} takes at most {self._most} here"
            )
        return references

    def load(
        self, request: Mapping[str, Any], references: Sequence[MediaReference]
    ) -> AbstractAsyncContextManager[list[LoadedImage]]:
        """Load the images of a request; they count as memory in use until the block ends.

        :raises InvalidRequestError: as the context is entered: one cannot be loaded.
        :raises WorkerUnavailable: as the context is entered: there is no room for them.
        """
        scope = request.get("image_cache_scope")
        return self._media.load(references, scope=None if scope is None else fields.string("image_cache_scope", scope))
