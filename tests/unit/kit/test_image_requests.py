"""Which requests with images an engine accepts, and what the others are told."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.image_requests import FIELDS, ImageRequests
from dynamo_worker.kit.media_settings import MediaSettings

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def request(count: int, **others: Any) -> dict[str, Any]:
    item = {"Url": f"data:image/png;base64,{PNG}"}
    return {"token_ids": [1], "multi_modal_data": {"image_url": [item] * count}, **others}


async def started(most: int, *, enabled: bool = True) -> ImageRequests:
    images = ImageRequests(MediaSettings(), enabled=enabled)
    await images.start("llava", most)
    return images


@pytest.mark.parametrize(
    ("most", "enabled", "count", "message"),
    [
        (0, True, 1, "llava takes no images, and the request has 1"),
        (0, False, 1, "llava takes no images, and the request has 1"),
        (3, False, 1, "this worker takes no images: it was started without --enable-multimodal"),
        (3, True, 4, "the request has 4 images, and llava takes at most 3 here"),
    ],
)
def test_refused_by_name(most: int, enabled: bool, count: int, message: str) -> None:
    async def check() -> None:
        images = await started(most, enabled=enabled)
        try:
            with pytest.raises(InvalidRequestError) as caught:
                images.references(request(count))
            assert str(caught.value) == message
            assert not images.references({"token_ids": [1]})
            assert not images.references({"token_ids": [1], "multi_modal_data": None})
        finally:
            await images.close()

    asyncio.run(check())


def test_before_the_start_nothing_is_accepted() -> None:
    with pytest.raises(InvalidRequestError, match="the model takes no images"):
        ImageRequests(MediaSettings(), enabled=True).references(request(1))


def test_other_media_are_refused() -> None:
    async def check() -> None:
        images = await started(3)
        try:
            with pytest.raises(InvalidRequestError, match="video_url"):
                images.references({"token_ids": [1], "multi_modal_data": {"video_url": [{"Url": "http://a/b"}]}})
        finally:
            await images.close()

    asyncio.run(check())


def test_images_are_loaded_in_order_and_a_wrong_scope_is_refused() -> None:
    from PIL import Image

    async def check() -> None:
        images = await started(3)
        try:
            file = io.BytesIO()
            Image.new("RGB", (2, 3), (9, 8, 7)).save(file, "PNG")
            asked = request(1)
            other = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            asked["multi_modal_data"]["image_url"].append({"Url": other})
            async with images.load(asked, images.references(asked)) as loaded:
                assert [(image.width, image.height) for image in loaded] == [(1, 1), (2, 3)]
                assert bytes(loaded[1].pixels) == bytes((9, 8, 7)) * 6
            wrong = request(1, image_cache_scope=7)
            with pytest.raises(InvalidRequestError, match="image_cache_scope"):
                images.load(wrong, images.references(wrong))
        finally:
            await images.close()

    asyncio.run(check())


def test_every_field_that_engines_leave_to_this_is_one_of_requests() -> None:
    from dynamo_worker.requests import Request

    assert set(FIELDS) <= set(Request.__annotations__)
