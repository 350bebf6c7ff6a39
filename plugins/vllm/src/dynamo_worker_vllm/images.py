"""The images of requests, as vLLM takes them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt

from dynamo_worker import InvalidRequestError
from dynamo_worker.errors import describe
from dynamo_worker.kit import fields

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.engine.async_llm import AsyncLLM

    from dynamo_worker.engine import Request
    from dynamo_worker.kit.media import LoadedImage

#: vLLM's names for images among the kinds of data that models take; the second one has videos, too (Kimi K2.5).
_IMAGE, _CHUNK = "image", "vision_chunk"
#: A frontend that routes by images names each with this many hexadecimal digits.
_ROUTED_DIGITS: Final = 16
#: How an id from a frontend ends in vLLM's KV events (Dynamo's convention).
_ROUTED_END: Final = "0" * 48
#: Images from frontends whose content is remembered.
_MOST_ROUTED: Final = 1 << 16


def most_per_request(llm: AsyncLLM) -> int:
    """Return how many images the model takes in one request with these settings; 0 if it takes none."""
    limits = _limits(llm)
    return limits.get(_IMAGE) or limits.get(_CHUNK, 0)


def _limits(llm: AsyncLLM) -> Mapping[str, int]:
    processor = llm.renderer.mm_processor
    return {} if processor is None else processor.info.allowed_mm_limits


class Preparation:
    """Prepares prompts with images for vLLM: in threads, while the event loop goes on."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._kind = _IMAGE if _limits(llm).get(_IMAGE) else _CHUNK
        self._routed: OrderedDict[str, str] = OrderedDict()

    async def prompt(self, request: Request, images: Sequence[LoadedImage], cache_salt: str | None) -> Any:
        """Return a request's prompt, in which the tokens of each image stand where the image was named.

        :raises InvalidRequestError: prompt and images do not belong together, or vLLM rejects an image.
        """
        pictures: list[Any] = await asyncio.to_thread(lambda: [image.to_pil() for image in images])
        if self._kind == _CHUNK:
            pictures = [{"type": "image", "image": picture, "uuid": None} for picture in pictures]
        prompt = TokensPrompt(
            prompt_token_ids=request["token_ids"],
            multi_modal_data={self._kind: pictures},
            multi_modal_uuids={self._kind: self._ids(request, images)},
        )
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        try:
            return await self._llm.renderer.process_for_engine_async(prompt, time.time())
        except (VLLMClientError, ValueError, TypeError, RuntimeError, AssertionError, LookupError) as error:
            # Whatever vLLM or a model's own processor makes of them: no other worker could do more with them.
            raise InvalidRequestError(f"the prompt's images cannot be prepared: {describe(error)}") from error

    def _ids(self, request: Mapping[str, Any], images: Sequence[LoadedImage]) -> list[str]:
        """Return the ids under which vLLM caches the images, and by which its KV events name them.

        They state what is in an image. A frontend that routes by images goes by its own ids, so these are used instead,
        as long as each stands for the same content: behind a URL there may be another image tomorrow.

        :raises InvalidRequestError: the ids are not a list of text.
        """
        hashes = [image.hash for image in images]
        given = fields.section(request, "extra_args").get("mm_hashes")
        if not given:
            return hashes
        name = "extra_args.mm_hashes"
        if not isinstance(given, list) or len(given) != len(images):
            raise fields.refusal(name, f"a list of {len(images)} ids", given)
        return [self._routed_id(name, routed, content) for routed, content in zip(given, hashes, strict=True)]

    def _routed_id(self, name: str, routed: Any, content: str) -> str:
        if routed is None:
            return content
        digits = fields.string(name, routed)[:_ROUTED_DIGITS].lower()
        if len(digits) != _ROUTED_DIGITS or not set(digits) <= set("0123456789abcdef"):
            raise fields.refusal(name, f"ids of at least {_ROUTED_DIGITS} hexadecimal digits", routed)
        known = self._routed.setdefault(digits, content)
        self._routed.move_to_end(digits)
        if len(self._routed) > _MOST_ROUTED:
            self._routed.popitem(last=False)
        return digits + _ROUTED_END if known == content else content
