"""Under which ids vLLM caches images, and what its errors about them become."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit.media import LoadedImage
from dynamo_worker_vllm import images

RED, BLUE = "a" * 64, "b" * 64
ROUTED = "0123456789abcdef"


class Renderer:
    """Takes prompts as vLLM's does."""

    def __init__(self, limits: dict[str, int], error: Exception | None = None) -> None:
        self.mm_processor = SimpleNamespace(info=SimpleNamespace(allowed_mm_limits=limits))
        self.error = error
        self.prompts: list[Any] = []

    async def process_for_engine_async(self, prompt: Any, arrival: float) -> Any:
        self.prompts.append(prompt)
        if self.error is not None:
            raise self.error
        return {"type": "multimodal", **prompt}


def loaded(*hashes: str) -> list[LoadedImage]:
    return [LoadedImage(each, b"", "PNG", 1, 1, memoryview(b"\1\2\3")) for each in hashes]


def ids(preparation: images.Preparation, renderer: Renderer, *hashes: str, **extra: Any) -> Any:
    request: Any = {"token_ids": [1], "extra_args": extra}
    asyncio.run(preparation.prompt(request, loaded(*hashes), "tenant"))
    prompt = renderer.prompts[-1]
    assert prompt["cache_salt"] == "tenant"
    return prompt["multi_modal_uuids"]["image"]


@pytest.fixture
def renderer() -> Renderer:
    return Renderer({"image": 3})


@pytest.fixture
def preparation(renderer: Renderer) -> images.Preparation:
    return images.Preparation(SimpleNamespace(renderer=renderer))


def test_by_content(preparation: images.Preparation, renderer: Renderer) -> None:
    assert ids(preparation, renderer, RED, BLUE) == [RED, BLUE]
    assert ids(preparation, renderer, RED, mm_hashes=None) == [RED]
    assert ids(preparation, renderer, RED, BLUE, mm_hashes=[None, None]) == [RED, BLUE]


def test_as_the_frontend_routes(preparation: images.Preparation, renderer: Renderer) -> None:
    marked = ROUTED + "0" * 48
    assert ids(preparation, renderer, RED, mm_hashes=[ROUTED + "77"]) == [marked]
    assert ids(preparation, renderer, RED, mm_hashes=[ROUTED.upper()]) == [marked]
    # The same id for another file, such as a URL whose image has changed.
    assert ids(preparation, renderer, BLUE, mm_hashes=[ROUTED]) == [BLUE]
    assert ids(preparation, renderer, RED, mm_hashes=[ROUTED]) == [marked]


def test_what_is_remembered_is_bounded(
    preparation: images.Preparation, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_MOST_ROUTED", 2)
    for number in range(5):
        ids(preparation, renderer, RED, mm_hashes=[f"{number:016x}"])
    assert len(preparation._routed) == 2


@pytest.mark.parametrize("wrong", [["short"], ["g" * 16], [7], [ROUTED, ROUTED], ROUTED, {"a": 1}])
def test_wrong_ids(preparation: images.Preparation, renderer: Renderer, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"extra_args\.mm_hashes"):
        ids(preparation, renderer, RED, mm_hashes=wrong)


@pytest.mark.parametrize("error", [VLLMValidationError("no"), ValueError("no"), RuntimeError("no"), IndexError("no")])
def test_what_vllm_makes_of_an_image_is_the_matter_of_its_request(error: Exception) -> None:
    preparation = images.Preparation(SimpleNamespace(renderer=Renderer({"image": 3}, error)))
    request: Any = {"token_ids": [1]}
    with pytest.raises(InvalidRequestError, match=r"images cannot be prepared: .*no"):
        asyncio.run(preparation.prompt(request, loaded(RED), None))


def test_how_many() -> None:
    def most(limits: dict[str, int]) -> int:
        return images.most_per_request(SimpleNamespace(renderer=Renderer(limits)))

    assert (most({"image": 3, "video": 1}), most({"vision_chunk": 9}), most({"video": 1}), most({})) == (3, 9, 0, 0)
    assert images.most_per_request(SimpleNamespace(renderer=SimpleNamespace(mm_processor=None))) == 0


def test_models_that_take_chunks() -> None:
    renderer = Renderer({"vision_chunk": 9})
    request: Any = {"token_ids": [1]}
    asyncio.run(images.Preparation(SimpleNamespace(renderer=renderer)).prompt(request, loaded(RED), None))
    (prompt,) = renderer.prompts
    assert prompt["multi_modal_uuids"] == {"vision_chunk": [RED]}
    (chunk,) = prompt["multi_modal_data"]["vision_chunk"]
    assert (chunk["type"], chunk["image"].size) == ("image", (1, 1))
