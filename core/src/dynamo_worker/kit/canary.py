"""Canary requests: the cheapest real request, with which the worker warms an engine up and checks that it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.requests import Request
    from dynamo_worker.text import TextRequest

#: Dynamo's mark on health-check requests.
MARK: Final = "_HEALTH_CHECK"


def canary_request(tokenizer: object, text_config: object, *, prompt_tokens: int = 1) -> Request:
    """Return a request for one token; its prompt is the token with which the model's prompts begin.

    :param tokenizer: a Hugging Face tokenizer, or None.
    :param text_config: the model's Hugging Face configuration.
    :param prompt_tokens: how many times the prompt has that token.
    """
    candidates = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(text_config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    first = next((token for token in candidates if isinstance(token, int)), 0)
    return {
        "token_ids": [first] * prompt_tokens,
        "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
        "_HEALTH_CHECK": True,
    }


def text_canary(model: str) -> TextRequest:
    """Return a request for one token, for a text engine that serves chats.

    :param model: the name of the model.
    """
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def is_canary(request: Mapping[str, Any]) -> bool:
    """Return whether a request is a health check, which no other worker takes part in."""
    return bool(request.get(MARK))
