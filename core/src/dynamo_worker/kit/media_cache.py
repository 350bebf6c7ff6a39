"""Decoded images by the content of their files: the least recently used give way."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dynamo_worker.kit.media_decoders import DecodedImage


#: Bytes that an image takes beside its pixels, so that a million tiny ones do not count as nothing.
_OVERHEAD: Final = 4096


class ImageCache:
    """Decoded images, up to a number of bytes.

    The key is the SHA-256 of a file, so no content can stand for another. Requests of different scopes share nothing.
    """

    def __init__(self, most: int) -> None:
        """Start empty.

        :param most: bytes of all images together; 0 keeps nothing.
        """
        self._most, self._size = most, 0
        self._images: collections.OrderedDict[tuple[str | None, str], DecodedImage] = collections.OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of all that is kept."""
        return self._size

    def get(self, scope: str | None, content: str) -> DecodedImage | None:
        """Return an image, if it is there.

        :param content: hash of the file.
        """
        image = self._images.get((scope, content))
        if image is not None:
            self._images.move_to_end((scope, content))
        return image

    def put(self, scope: str | None, content: str, image: DecodedImage) -> None:
        """Keep an image, if it fits at all."""
        if _size(image) > self._most or (scope, content) in self._images:
            return
        self._images[scope, content] = image
        self._size += _size(image)
        while self._size > self._most:
            self._size -= _size(self._images.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop all images; those in use stay until their requests end."""
        self._images.clear()
        self._size = 0


def _size(image: DecodedImage) -> int:
    return image.size + _OVERHEAD
