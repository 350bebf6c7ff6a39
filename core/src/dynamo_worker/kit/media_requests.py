"""Reads which media a request names: ``multi_modal_data`` of Dynamo's ``PreprocessedRequest``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit.fields import refusal, section

_FIELD: Final = "multi_modal_data"
#: The frontend's word for images; it also has ``video_url`` and ``audio_url``.
IMAGES: Final = "image_url"
#: How the frontend hands over an item that is not a URL, and why it is refused.
_OTHER_FORMS: Final = {
    "Decoded": "the frontend has decoded it, and this worker loads images itself; register the model without "
    "frontend decoding",
    "UuidOnly": "it has a UUID but no URL, and this worker keeps no images by UUID; send the image again",
}


class MediaReference(NamedTuple):
    """One item that a request names.

    :param number: of the item in the request, from 1.
    :param items: how many the request has.
    :param url: ``https:``, ``http:``, ``data:`` or ``file:``; not checked yet.
    """

    number: int
    items: int
    url: str

    @property
    def name(self) -> str:
        """The item's name in messages, such as ``image 2 of 3``."""
        return "the image" if self.items == 1 else f"image {self.number} of {self.items}"


def images(request: Mapping[str, Any]) -> list[MediaReference]:
    """Return the images that a request names, in the prompt's order; empty for a request of text.

    :raises InvalidRequestError: the request names other media, or an image in a form that this worker cannot load.
    """
    media = section(request, _FIELD)
    for kind in media:
        if kind != IMAGES and media[kind]:
            raise InvalidRequestError(f"{_FIELD}: {shown(kind)} is not supported by this worker, only {IMAGES!r}")
    items = media.get(IMAGES) or ()
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise refusal(f"{_FIELD}.{IMAGES}", "a list", items)
    return [MediaReference(number, len(items), _url(number, item)) for number, item in enumerate(items, 1)]


def _url(number: int, item: Any) -> str:
    name = f"{_FIELD}.{IMAGES}[{number - 1}]"
    if isinstance(item, Mapping):
        for form in ("Url", "RawUrl"):
            if isinstance(item.get(form), str):
                return str(item[form])
        for form, why in _OTHER_FORMS.items():
            if form in item:
                raise InvalidRequestError(f"{name} cannot be loaded: {why}")
    raise refusal(name, 'an object {"Url": …}', item)
