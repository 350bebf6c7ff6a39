"""What a text engine receives and answers: requests and chunks of OpenAI's chat and completions APIs.

An engine is a text engine if its ``EngineInfo.model_input`` is ``text``. What frontends of Dynamo 1.6.1 send and accept
was measured on the real frontend; the fields of a request are those of OpenAI's APIs, and any but ``model`` and the
prompt may be missing. A chunk must be JSON: keys are strings, numbers are finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003 - typing.get_type_hints looks them up
from typing import Any, TypedDict

from dynamo_worker.responses import CompletionUsage  # noqa: TC001 - typing.get_type_hints looks it up


class StreamOptions(TypedDict, total=False):
    """What a stream contains beside the text: ``stream_options`` of OpenAI.

    :param include_usage: whether the client wants the token counts in a last chunk.
    :param continuous_usage_stats: whether it wants them in every chunk.
    """

    include_usage: bool | None
    continuous_usage_stats: bool | None


class _Model(TypedDict):
    model: str


class TextRequest(_Model, total=False):
    """One request, with the prompt as text: the body of a chat or a completions request, as its client has sent it.

    :param model: the name the client asked for. Always a text here.
    :param messages: of a chat request: the conversation, never empty. Each is an object with a ``role``; ``content``
        may be a text, a list of parts, or missing.
    :param prompt: of a completions request: a text, never empty, or a list of token ids if the client has sent one. A
        list of texts arrives as one request for each.
    :param stream: whether the client wants a stream. The answer to the frontend is one either way.
    :param stream_options: what the stream contains beside the text.
    :param max_tokens: longest answer in tokens.
    :param max_completion_tokens: the same, of newer chat clients; wins.
    :param n: number of answers; each has its own ``index`` in the chunks.
    :param stop: stop strings, one or several. The frontend does not stop at them: the engine does.
    :param temperature: divides the logits; 0 always takes the likeliest token.
    :param top_p: probability mass to choose from, above 0 up to 1.
    :param seed: seed of the random numbers for this request.
    :param presence_penalty: subtracted from the logit of each token that occurred, from -2 to 2.
    :param frequency_penalty: subtracted once per occurrence, from -2 to 2.
    :param logit_bias: added to the logits, by token id as text.
    :param logprobs: of a chat request: whether to return log probabilities; of a completions request: how many.
    :param top_logprobs: of a chat request: number of likeliest tokens to list for each token.
    :param tools: functions that the model may call.
    :param tool_choice: which of them it must call.
    :param response_format: constraint on the text of the answer.
    :param user: the client's name for its user.
    :param nvext: Dynamo's own extensions.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: str | Sequence[int]
    stream: bool | None
    stream_options: StreamOptions | None
    max_tokens: int | None
    max_completion_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | None
    logprobs: bool | int | None
    top_logprobs: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    user: str | None
    nvext: Mapping[str, Any] | None


class TextDelta(TypedDict, total=False):
    """New text of a chat answer: ``delta`` of OpenAI. May be empty.

    :param role: ``assistant``, in the first chunk.
    :param content: the new text only.
    :param reasoning_content: new text of the reasoning part.
    :param tool_calls: new parts of calls of functions, each with its ``index``.
    """

    role: str | None
    content: str | None
    reasoning_content: str | None
    tool_calls: Sequence[Mapping[str, Any]] | None


class _Index(TypedDict):
    index: int


class TextChoice(_Index, total=False):
    """A part of one answer: ``choices[]`` of OpenAI.

    :param index: the answer it belongs to, from 0 up to ``n`` - 1.
    :param delta: of a chat answer: what is new. The frontend fails the request without it.
    :param text: of a completions answer: the new text only. The frontend fails the request without it.
    :param finish_reason: in the last chunk of each answer only: ``stop``, ``length`` or ``content_filter``; in a chat
        ``tool_calls`` or ``function_call``.
    :param logprobs: log probabilities in the form of the API.
    """

    delta: TextDelta
    text: str
    finish_reason: str | None
    logprobs: Mapping[str, Any] | None


class _TextChunk(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: Sequence[TextChoice]


class TextChunk(_TextChunk, total=False):
    """One piece of an answer: a ``chat.completion.chunk`` or a ``text_completion`` of OpenAI.

    The frontend fails the request if a field but ``usage`` is missing.

    :param id: the same in all chunks of an answer.
    :param object: ``chat.completion.chunk`` or ``text_completion``.
    :param created: time of the answer in seconds since 1970.
    :param model: the name the client asked for.
    :param choices: the new parts of the answers; empty in a chunk with ``usage`` only.
    :param usage: token counts, in the last chunk.
    """

    usage: CompletionUsage | None
