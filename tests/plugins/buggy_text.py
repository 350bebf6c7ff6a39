"""The buggy engine as one that takes text, with a bug of text engines (``dynamo_worker_buggy.BUG``)."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from typing import Any

from buggy_engine import BuggyEngine
from dynamo_worker_buggy import BUG

from dynamo_worker import EngineContext, RequestContext
from dynamo_worker.engines.echo_text import EchoTextEngine

#: What the frontend does for engines that take tokens.
_STOP = "stop"


class BuggyTextEngine(EchoTextEngine):
    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(BuggyEngine(args, context), args.served_model_name)

    async def generate(self, request: Any, context: RequestContext) -> AsyncIterator[Any]:
        unasked = bool(request.get("stream")) and not request.get("stream_options")
        if BUG == "text-ignores-stop-strings":
            request = {name: value for name, value in request.items() if name != _STOP}
        elif BUG == "text-ignores-unknown-fields":
            request = {name: value for name, value in request.items() if name != "no_such_option"}
        elif BUG == "text-counts-unasked" and unasked:
            request = {**request, "stream_options": {"include_usage": True}}
        text = ""
        async for chunk in super().generate(request, context):
            if BUG == "text-is-never-counted" and not chunk["choices"]:
                continue
            if BUG == "text-has-no-model":
                del chunk["model"]
            for choice in chunk["choices"]:
                delta = choice.get("delta", {})
                text += delta.get("content", "")
                if BUG == "text-repeats-old-text":
                    delta["content"] = text
            yield chunk
