"""Requests with the prompt as text: the bodies of OpenAI's chat and completions APIs, as frontends pass them on.

What frontends of Dynamo 1.6.1 do with them was measured on the real one. They send such a request to one worker and
never to a second one, whatever its error, and even before its first chunk; and they take an answer that just ends for a
complete one. So the worker itself has to notice the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Disconnected

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.host.requests.engine_checks import OtherKindError, not_encodable
from dynamo_worker.host.requests.token_kind import check_ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from dynamo_worker.engine import Generate, Push, RequestContext, Send
    from dynamo_worker.host.requests.engine_checks import EngineChecks
    from dynamo_worker.text import TextRequest

#: The field with the prompt, by endpoint type, and the ``object`` of the chunks.
_PROMPTS: Final = {"chat": "messages", "completions": "prompt"}
_OBJECTS: Final = {"messages": "chat.completion.chunk", "prompt": "text_completion"}
#: Finish reasons that the frontend accepts, by the field with the prompt (measured on 1.6.1).
_COMPLETION_REASONS: Final = frozenset({"stop", "length", "content_filter"})
FINISH_REASONS: Final[Mapping[str, Collection[str]]] = {
    "messages": _COMPLETION_REASONS | {"tool_calls", "function_call"},
    "prompt": _COMPLETION_REASONS,
}
#: Most messages of a conversation: each is looked at on the event loop.
MOST_MESSAGES: Final = 16_384


class TextRequests:
    """The kind of requests of an engine that takes text.

    :param endpoint_types: the APIs that the engine serves.
    :param vocab_size: number of token ids, for clients that send a prompt as tokens; None if only the engine can tell.
    :param context_length: longest sequence in tokens, for the same; None if only the engine can tell.
    """

    #: The APIs whose requests this kind knows.
    ENDPOINT_TYPES: Final = tuple(_PROMPTS)
    name = "text"
    migrates = False

    def __init__(
        self,
        endpoint_types: Collection[str] = tuple(_PROMPTS),
        vocab_size: int | None = None,
        context_length: int | None = None,
    ) -> None:
        self._prompts = [_PROMPTS[name] for name in endpoint_types]
        self._vocab_size = vocab_size
        self._context_length = context_length

    def checked(self, request: Any) -> TextRequest:
        """Return a request whose model and prompt an engine can rely on.

        :raises OtherKindError: it is a request with tokens.
        :raises InvalidRequestError: it is not an object, or one of them is missing or of the wrong type.
        """
        if not isinstance(request, dict):
            raise InvalidRequestError(f"expected a request object, got {type(request).__name__}")
        given = [name for name in _OBJECTS if request.get(name) is not None]
        if not given and "token_ids" in request:
            raise OtherKindError("this worker takes text, and the request has tokens")
        if not given and "input" in request:
            raise InvalidRequestError("this worker generates text, and the request asks for embeddings")
        if len(given) != 1:
            raise InvalidRequestError(
                f"expected {' or '.join(self._prompts)}, got {' and '.join(given) if given else 'neither'}"
            )
        if given[0] not in self._prompts:
            raise InvalidRequestError(f"{given[0]}: the model serves requests with {' or '.join(self._prompts)} only")
        if not isinstance(request.get("model"), str):
            raise InvalidRequestError(f"model: expected a text, got {shown(request.get('model'))}")
        if not isinstance(request.get("stream"), (bool, type(None))):
            raise InvalidRequestError(f"stream: expected true or false, got {shown(request['stream'])}")
        if given[0] == "messages":
            _check_messages(request["messages"])
        else:
            self._check_prompt(request["prompt"])
        checked: TextRequest = request  # type: ignore[assignment]
        return checked

    def _check_prompt(self, prompt: Any) -> None:
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("prompt: it is empty")
            return
        if not isinstance(prompt, list):
            raise InvalidRequestError(f"prompt: expected a text or a list of token ids, got {shown(prompt)}")
        if self._context_length is not None and len(prompt) > self._context_length:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens; the model's context length is {self._context_length}"
            )
        if not set(map(type, prompt)) <= {int}:  # isinstance would accept booleans
            wrong = next(token for token in prompt if type(token) is not int)
            raise InvalidRequestError(f"prompt: expected one text or one list of token ids, got {shown(wrong)} in it")
        check_ids("prompt", prompt, self._vocab_size)

    def guarded(self, generate: Generate) -> Generate:
        """Return ``generate`` with an error at the end of an answer that is not complete."""

        async def guarded(request: Any, context: RequestContext) -> AsyncIterator[Any]:
            ends = _Ends()
            stream = generate(request, context)
            try:
                async for chunk in stream:
                    ends.take(chunk)
                    yield chunk
            finally:
                if hasattr(stream, "aclose"):
                    await stream.aclose()
            ends.check()

        return guarded

    def guarded_push(self, push: Push) -> Push:
        """Return ``push`` with an error at the end of an answer that is not complete."""

        async def guarded(request: Any, context: RequestContext, send: Send) -> None:
            ends = _Ends()

            def take_and_send(chunk: Any) -> None:
                ends.take(chunk)
                send(chunk)

            await push(request, context, take_and_send)
            ends.check()

        return guarded

    def first_answer(self, checks: EngineChecks, request: Mapping[str, Any]) -> TextAnswerCheck:
        """Return the check of the engine's answer to its canary request."""
        return TextAnswerCheck(checks, request)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(f"messages: expected a list of messages, got {shown(messages)}")
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequestError(
            f"messages: {len(messages)} messages are too many, at most {MOST_MESSAGES} are accepted"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{number}]: expected an object with a role, got {shown(message)}")


class _Ends:
    """Which answers of one request have ended: the frontend would show one without an end as complete."""

    __slots__ = ("_ended", "_open")

    def __init__(self) -> None:
        self._open: set[Any] = set()
        self._ended: set[Any] = set()

    def take(self, chunk: Any) -> None:
        """Note what a chunk ends.

        :raises TypeError: it is no chunk.
        """
        try:
            for choice in chunk["choices"]:
                index = choice["index"]
                if choice.get("finish_reason") is not None:
                    self._ended.add(index)
                elif index not in self._open:
                    self._open.add(index)
        except (KeyError, TypeError, AttributeError):
            raise TypeError(f"the engine sent a chunk that OpenAI's API does not have: {chunk!r:.200}") from None

    def check(self) -> None:
        """Check that everything has ended.

        :raises Disconnected: an answer has not; its client may ask once more.
        """
        if not self._ended or self._open - self._ended:
            raise Disconnected("the engine's answer ended without a finish_reason")


class TextAnswerCheck:
    """Checks the chunks of one answer.

    :param checks: the checks of the engine that answers.
    :param request: what it answers.
    """

    def __init__(self, checks: EngineChecks, request: Mapping[str, Any]) -> None:
        self._checks = checks
        self._prompt = "prompt" if request.get("messages") is None else "messages"
        self._ends = _Ends()
        self._finished: set[Any] = set()

    def take(self, chunk: object) -> None:
        """Check the next chunk.

        :raises StartError: no frontend could use it.
        """
        wrong = wrong_chunk(chunk, self._prompt) or not_encodable(chunk)
        if wrong is None:
            assert isinstance(chunk, dict)
            self._ends.take(chunk)
            for choice in chunk["choices"]:
                if choice["index"] in self._finished:
                    wrong = "continues after its finish_reason"
                if choice.get("finish_reason") is not None:
                    self._finished.add(choice["index"])
        if wrong is not None:
            raise self._checks.problem(f"its first answer {wrong}; the chunk is {chunk!r:.200}")

    def end(self) -> None:
        """Check that the answer was complete.

        :raises StartError: an answer had no finish reason.
        """
        try:
            self._ends.check()
        except Disconnected:
            raise self._checks.problem("its first answer ended without a finish_reason") from None


def wrong_chunk(chunk: object, prompt: str) -> str | None:
    """Return why the frontend could not use a chunk, or None; it says so with HTTP 500 and no reason.

    :param prompt: the field with the prompt of the request: ``messages`` or ``prompt``.
    """
    if not isinstance(chunk, dict):
        return f"has a chunk of type {type(chunk).__name__}, expected a dict"
    if chunk.get("object") != _OBJECTS[prompt]:
        whole = "; a text engine answers in chunks, if its client wants no stream, too"
        return f"has a chunk with object {chunk.get('object')!r:.80}, expected {_OBJECTS[prompt]!r}{whole}"
    for name, kind in (("id", str), ("created", int), ("model", str), ("choices", list)):
        if type(chunk.get(name)) is not kind:
            return f"has a chunk with {name} {chunk.get(name)!r:.80}: expected {kind.__name__}"
    for choice in chunk["choices"]:
        wrong = _wrong_choice(choice, prompt)
        if wrong is not None:
            return wrong
    return None


def _wrong_choice(choice: object, prompt: str) -> str | None:
    if not isinstance(choice, dict) or type(choice.get("index")) is not int or choice["index"] < 0:
        return "has a choice without an index from 0"
    name, kind = ("delta", dict) if prompt == "messages" else ("text", str)
    if not isinstance(choice.get(name), kind):
        return f"has a choice with {name} {choice.get(name)!r:.80}: expected {kind.__name__}"
    reason = choice.get("finish_reason")
    known = FINISH_REASONS[prompt]
    if reason is not None and (not isinstance(reason, str) or reason not in known):
        return f"has the finish_reason {reason!r:.80}; expected one of {', '.join(sorted(known))}"
    return None
