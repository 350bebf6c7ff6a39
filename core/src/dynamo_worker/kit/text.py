"""Requests and chunks of a text engine: bodies and chunks of OpenAI's chat and completions APIs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import chunks, fields
from dynamo_worker.kit.request_limits import STOP_STRING_CHARACTERS, STOP_STRINGS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dynamo_worker.engine import RequestContext
    from dynamo_worker.text import TextChoice, TextChunk, TextRequest

#: Fields that ask nothing of an engine: the prompt, and what :class:`TextChunks` reads.
BASIC: Final = frozenset({"model", "messages", "prompt", "stream", "stream_options", "user", "nvext"})


def is_chat(request: Mapping[str, Any]) -> bool:
    """Return whether this is a chat request; otherwise it is one of the completions API."""
    return request.get("messages") is not None


def refuse_others(request: Mapping[str, Any], honoured: Collection[str]) -> None:
    """Refuse all fields but these, so that a client can tell what it does not get.

    :param honoured: the fields that the engine reads, beside :data:`BASIC`.
    :raises InvalidRequestError: another field has a value.
    """
    for name, value in request.items():
        if value is not None and name not in BASIC and name not in honoured:
            raise InvalidRequestError(f"{name} is not supported by this engine")


def max_tokens(request: Mapping[str, Any]) -> int | None:
    """Return the length of the longest answer in tokens, or None if the client has not said.

    :raises InvalidRequestError: it is no number of tokens.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        if request.get(name) is not None:
            return fields.token_count(name, request[name])
    return None


def stop_strings(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the stop strings.

    :raises InvalidRequestError: they are not strings, empty, too many or too long.
    """
    given = request.get("stop")
    if given is None:
        return ()
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise fields.refusal("stop", "a text or a list of texts", given)
    STOP_STRINGS.check("stop", len(strings))
    STOP_STRING_CHARACTERS.check("stop", max(map(len, strings), default=0))
    return tuple(strings)


def last_message(request: TextRequest) -> str:
    """Return the text of a chat's last message; parts that are no text are refused.

    :raises InvalidRequestError: it has parts of other kinds.
    """
    content = request["messages"][-1].get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise fields.refusal("messages: content", "a text or a list of parts", content)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequestError("messages: the engine supports parts of type `text` only")
        texts.append(text)
    return "".join(texts)


class StopStrings:
    """Ends a text before its first stop string; holds back what may be the beginning of one.

    :param strings: the stop strings.

    :ivar stopped: whether one was found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.stopped = False
        self._strings = strings
        self._held = ""

    def take(self, text: str) -> str:
        """Return what can be sent now that ``text`` has been generated; nothing after a stop string."""
        if not self._strings:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = min((at for string in self._strings if (at := text.find(string)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        held = max(_beginning(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, string: str) -> int:
    """Return how many characters at the end of a text may begin a string."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)


class TextChunks:
    """Builds the chunks of the answer to one request, in the form of its API.

    :ivar wants_usage: whether the client gets token counts: always without a stream, otherwise if it asks for them.
    """

    def __init__(self, request: Mapping[str, Any], context: RequestContext) -> None:
        """Answer ``request``.

        :raises InvalidRequestError: its ``stream_options`` are wrong.
        """
        self._chat = is_chat(request)
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if self._chat else ("cmpl", "text_completion")
        self._head = {
            "id": f"{prefix}-{context.id()}",
            "object": kind,
            "created": int(time.time()),
            "model": request["model"],
        }
        self._begun: set[int] = set()
        options = request.get("stream_options")
        options = {} if options is None else fields.mapping("stream_options", options)
        if options.get("continuous_usage_stats"):
            raise InvalidRequestError("stream_options.continuous_usage_stats is not supported by this engine")
        self.wants_usage = not request.get("stream") or bool(options.get("include_usage"))

    def chunk(self, text: str, *, index: int = 0, finish_reason: str | None = None) -> TextChunk:
        """Return the chunk of new text of one answer.

        :param finish_reason: in the answer's last chunk: ``stop``, ``length`` or ``content_filter``.
        """
        choice: TextChoice = {"index": index, "finish_reason": finish_reason}
        if not self._chat:
            choice["text"] = text
        elif index in self._begun:
            choice["delta"] = {"content": text}
        else:
            self._begun.add(index)
            choice["delta"] = {"role": "assistant", "content": text}
        return {**self._head, "choices": [choice]}  # type: ignore[typeddict-item]

    def usage(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> TextChunk:
        """Return the last chunk, with the token counts; send it if :attr:`wants_usage`."""
        counts = chunks.usage(prompt_tokens, completion_tokens, cached_tokens)
        return {**self._head, "choices": [], "usage": counts}  # type: ignore[typeddict-item]
