"""The images of requests, as SGLang takes them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_worker.kit.media import LoadedImage
    from dynamo_worker_sglang.manager import Manager

#: Images of one request where the operator sets no limit.
_UNLIMITED: Final = 1 << 20
#: SGLang's ids of images have 64 bits.
_DIGITS: Final = 16


def most_per_request(manager: Manager, settings: Mapping[str, Any]) -> int:
    """Return how many images the model takes in one request with these settings; 0 if it takes none."""
    if manager.mm_processor is None or not manager.model_config.is_multimodal:
        return 0
    limits = settings.get("limit_mm_data_per_request") or {}
    return int(limits.get("image", _UNLIMITED))


async def arguments(images: Sequence[LoadedImage]) -> dict[str, Any]:
    """Return images as arguments of ``GenerateReqInput``, each with an id that says what is in it."""
    return {
        "image_data": await asyncio.to_thread(lambda: [image.to_pil() for image in images]),
        "mm_hashes": [image.hash[:_DIGITS] for image in images],
    }
