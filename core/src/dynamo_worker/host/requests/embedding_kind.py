"""Requests for embeddings: the two forms in which frontends send them, and the two in which they expect the answer.

Measured with frontends of Dynamo 1.6.1. For a model that takes tokens they tokenize and send ``token_ids``, a list for
each input; for one that takes text they pass on OpenAI's ``input``. They understand one answer only, with vectors in
base64: as numbers the vectors of a model that takes tokens are HTTP 500, and those of one that takes text stay numbers
although the client wants base64. An answer that just ends becomes an empty list with HTTP 200. No such request runs a
second time, whatever its error and even if its worker dies.
"""

from __future__ import annotations

import asyncio
import binascii
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Disconnected

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.host.requests.token_kind import check_ids, unpacked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from dynamo_worker.embeddings import EmbeddingRequest, EmbeddingSpec
    from dynamo_worker.engine import EngineInfo, Generate, Push, RequestContext, Send
    from dynamo_worker.host.requests.engine_checks import EngineChecks

#: The API that this kind serves.
ENDPOINT_TYPE: Final = "embedding"
#: Most tokens, and most characters of text, of all inputs of a request together: each token is looked at on the event
#: loop.
MOST_TOKENS: Final = 2**20
MOST_CHARACTERS: Final = 2**23
#: Largest answer in bytes of vectors, 2048 with 4096 dimensions: frontends have no limit (100 MiB went through,
#: measured), but the client, the frontend and this worker each hold it in memory several times.
MOST_ANSWER_BYTES: Final = 2**25
#: Bytes of vectors that are checked and encoded before the event loop may do something else: some milliseconds.
_SLICE_BYTES: Final = 2**20
#: The last byte of a 32-bit float that is not finite, or has the largest exponent but one.
_HUGE: Final = (b"\x7f", b"\xff")
_FLOAT_BYTES: Final = 4


class EmbeddingRequests:
    """The kind of requests of an engine that makes embeddings.

    :param spec: the engine's vectors.
    :param info: what else the engine says of itself.
    """

    name = "embeddings"
    migrates = False

    def __init__(self, spec: EmbeddingSpec, info: EngineInfo) -> None:
        self._spec = spec
        self._text = info.model_input == "text"
        self._vocab_size = info.vocab_size
        self._context_length = info.context_length

    def checked(self, request: Any) -> EmbeddingRequest:
        """Return a request whose inputs an engine can rely on.

        :raises InvalidRequestError: it asks for something else, or something of it is missing or wrong.
        """
        if not isinstance(request, dict):
            raise InvalidRequestError(f"expected a request object, got {type(request).__name__}")
        if not isinstance(request.get("model"), str):
            raise InvalidRequestError(f"model: expected a text, got {shown(request.get('model'))}")
        checked: EmbeddingRequest = {"model": request["model"], "inputs": self._inputs(request)}
        if (dimensions := self._dimensions(request.get("dimensions"))) is not None:
            checked["dimensions"] = dimensions
        if request.get("encoding_format") not in (None, "float", "base64"):
            raise InvalidRequestError(
                f"encoding_format: expected float or base64, got {shown(request['encoding_format'])}"
            )
        if self._text:
            _copy_tokenization(request, checked)
        self._check_answer_size(len(checked["inputs"]), checked.get("dimensions"))
        return checked

    def _inputs(self, request: Mapping[str, Any]) -> list[str | list[int]]:
        """Return the inputs of a request in one form: a list of texts or lists of token ids.

        :raises InvalidRequestError: there are none, they are too many or too long, or one is no input.
        """
        given = next((request[name] for name in _INPUTS if request.get(name) is not None), None)
        if given is None or (given is request.get("token_ids") and _are_ids(given)):
            raise InvalidRequestError(_other_kind(request))
        if isinstance(given, str) or _are_ids(given):
            given = [given]
        if not isinstance(given, list):
            raise InvalidRequestError(
                f"input: expected a text, a list of texts, token ids or a list of lists of token ids, "
                f"got {shown(given)}"
            )
        if not given:
            raise InvalidRequestError("input: it is empty")
        if len(given) > self._spec.most_inputs:
            raise InvalidRequestError(
                f"input: {len(given)} inputs are too many, at most {self._spec.most_inputs} are accepted"
            )
        tokens = characters = 0
        inputs: list[str | list[int]] = []
        for number, one in enumerate(given):
            name = f"input[{number}]"
            if one in ("", []):
                raise InvalidRequestError(f"{name}: it is empty")
            if isinstance(one, str):
                if not self._text:
                    raise InvalidRequestError(f"{name}: this worker takes tokens, and the input is text")
                characters += len(one)
                inputs.append(one)
            else:
                inputs.append(self._tokens(name, one))
                tokens += len(inputs[-1])
            for count, most, unit in ((tokens, MOST_TOKENS, "tokens"), (characters, MOST_CHARACTERS, "characters")):
                if count > most:
                    raise InvalidRequestError(f"input: more than {most} {unit} in one request")
        return inputs

    def _tokens(self, name: str, given: Any) -> list[int]:
        tokens = unpacked(name, given, self._context_length, name)
        check_ids(name, tokens, self._vocab_size)
        return tokens

    def _dimensions(self, given: Any) -> int | None:
        if given is None or (given == self._spec.dimensions and type(given) is int):
            return None
        shorter, most = self._spec.shorter, self._spec.dimensions
        if type(given) is not int or given < 1:
            raise InvalidRequestError(f"dimensions: expected a number from 1 to {most}, got {shown(given)}")
        if not shorter:
            raise InvalidRequestError(f"dimensions: the model's embeddings have {most} dimensions, always")
        if given > most:
            raise InvalidRequestError(f"dimensions: {given} are too many, the model's embeddings have {most}")
        if not isinstance(shorter, bool) and given not in shorter:
            known = ", ".join(map(str, sorted({*shorter, most})))
            raise InvalidRequestError(f"dimensions: the model's embeddings can have {known} dimensions, not {given}")
        return given

    def _check_answer_size(self, inputs: int, dimensions: int | None) -> None:
        length = dimensions or self._spec.dimensions
        if inputs * length * _FLOAT_BYTES > MOST_ANSWER_BYTES:
            most = MOST_ANSWER_BYTES // (length * _FLOAT_BYTES)
            raise InvalidRequestError(
                f"input: {inputs} inputs are too many for one answer, at most {most} with {length} dimensions are"
            )

    def guarded(self, generate: Generate) -> Generate:
        """Return ``generate`` with the one answer that frontends understand."""

        async def guarded(request: Any, context: RequestContext) -> AsyncIterator[Any]:
            answer = _OneAnswer()
            stream = generate(request, context)
            try:
                async for chunk in stream:
                    answer.take(chunk)
            finally:
                if hasattr(stream, "aclose"):
                    await stream.aclose()
            yield await self._encoded(request, answer.whole())

        return guarded

    def guarded_push(self, push: Push) -> Push:
        """Return ``push`` with the one answer that frontends understand."""

        async def guarded(request: Any, context: RequestContext, send: Send) -> None:
            answer = _OneAnswer()
            await push(request, context, answer.take)
            send(await self._encoded(request, answer.whole()))

        return guarded

    async def _encoded(self, request: EmbeddingRequest, answer: Any) -> Any:
        """Return an answer in the form of the frontend's request.

        :raises TypeError: the engine's answer is none to this request.
        """
        wrong = _wrong_form(answer, request)
        if wrong is not None:
            raise TypeError(f"the engine's answer {wrong}")
        encoded, size, length = [], 0, request.get("dimensions") or self._spec.dimensions
        for index, vector in enumerate(answer["embeddings"]):
            try:
                raw = packed(vector, length)
            except ValueError as error:
                raise TypeError(f"the engine's answer has the embedding {index} {error}") from None
            encoded.append(binascii.b2a_base64(raw, newline=False).decode("ascii"))
            size += len(raw)
            if size >= _SLICE_BYTES:
                size = 0
                await asyncio.sleep(0)
        tokens = answer["prompt_tokens"]
        if not self._text:
            return {"embeddings": encoded, "prompt_tokens": tokens, "total_tokens": tokens}
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(encoded)
            ],
            "model": request["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def first_answer(self, checks: EngineChecks, request: Mapping[str, Any]) -> EmbeddingAnswerCheck:
        """Return the check of the engine's answer to its canary request."""
        return EmbeddingAnswerCheck(checks, request, self._spec)


def _are_ids(given: object) -> bool:
    return isinstance(given, list) and bool(given) and type(given[0]) is int


def _other_kind(request: Mapping[str, Any]) -> str:
    """Return the refusal of a request without inputs."""
    asked = next((what for name, what in _OTHER_KINDS.items() if request.get(name) is not None), None)
    if asked is None:
        return "input: it is missing"
    return f"this worker makes embeddings, and the request asks for {asked}"


#: Where a request has its inputs: in the engine's form, in OpenAI's, and as the frontend has tokenized them.
_INPUTS: Final = ("inputs", "input", "token_ids")
#: What a request asks for, by a field that requests for embeddings do not have.
_OTHER_KINDS: Final = {
    "messages": "a chat completion",
    "prompt": "a completion",
    "query": "a ranking",
    "token_ids": "generated tokens",
}


def _copy_tokenization(request: Mapping[str, Any], checked: EmbeddingRequest) -> None:
    """Copy what a request says about the tokenization of texts.

    :raises InvalidRequestError: it is wrong.
    """
    limit, special = request.get("truncate_prompt_tokens"), request.get("add_special_tokens")
    if limit is not None:
        if type(limit) is not int or limit < -1 or limit == 0:
            raise InvalidRequestError(f"truncate_prompt_tokens: expected a number from 1, or -1, got {shown(limit)}")
        checked["truncate_prompt_tokens"] = limit
    if special is not None:
        if type(special) is not bool:
            raise InvalidRequestError(f"add_special_tokens: expected true or false, got {shown(special)}")
        checked["add_special_tokens"] = special


class _OneAnswer:
    """Takes the chunks of an answer, of which there must be one."""

    __slots__ = ("_answer",)

    def __init__(self) -> None:
        self._answer: Any = None

    def take(self, chunk: Any) -> None:
        """Take the next chunk.

        :raises TypeError: there was one already.
        """
        if self._answer is not None:
            raise TypeError("the engine answered a request for embeddings twice")
        self._answer = chunk

    def whole(self) -> Any:
        """Return the answer.

        :raises Disconnected: there is none; the client may ask once more.
        """
        if self._answer is None:
            raise Disconnected("the engine's answer ended without embeddings")
        return self._answer


class EmbeddingAnswerCheck:
    """Checks the answer to one request.

    :param checks: the checks of the engine that answers.
    :param request: what it answers.
    :param spec: the engine's vectors.
    """

    def __init__(self, checks: EngineChecks, request: Mapping[str, Any], spec: EmbeddingSpec) -> None:
        self._checks = checks
        self._request = request
        self._spec = spec
        self._answer = _OneAnswer()

    def take(self, chunk: object) -> None:
        """Check the answer.

        :raises StartError: no frontend could use it.
        """
        wrong = wrong_answer(chunk, self._request, self._spec)
        if wrong is not None:
            raise self._checks.problem(f"its first answer {wrong}")
        try:
            self._answer.take(chunk)
        except TypeError:
            raise self._checks.problem("its first answer has two chunks; embeddings come in one") from None

    def end(self) -> None:
        """Check that there was an answer.

        :raises StartError: there was none.
        """
        try:
            self._answer.whole()
        except Disconnected:
            raise self._checks.problem("its first answer ended without embeddings") from None


def wrong_answer(answer: object, request: Mapping[str, Any], spec: EmbeddingSpec) -> str | None:
    """Return why an engine's answer is none to a request, or None if it is one.

    :param request: the request in the engine's form.
    """
    wrong = _wrong_form(answer, request)
    if wrong is not None:
        return wrong
    assert isinstance(answer, dict)
    for index, vector in enumerate(answer["embeddings"]):
        try:
            packed(vector, request.get("dimensions") or spec.dimensions)
        except ValueError as error:  # noqa: PERF203 - it ends the loop
            return f"has the embedding {index} {error}"
    return None


def _wrong_form(answer: object, request: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an answer, its vectors themselves apart."""
    if not isinstance(answer, dict):
        return f"is a {type(answer).__name__}, expected a dict with embeddings and prompt_tokens"
    tokens, vectors = answer.get("prompt_tokens"), answer.get("embeddings")
    if type(tokens) is not int or tokens < 0:
        return f"has prompt_tokens {tokens!r:.80}: expected a number of tokens"
    if not isinstance(vectors, (list, tuple)):
        return f"has embeddings of type {type(vectors).__name__}: expected a list of vectors"
    if len(vectors) != len(request["inputs"]):
        return f"has {len(vectors)} embeddings for {len(request['inputs'])} inputs"
    return None


def packed(vector: object, length: int) -> bytes:
    """Return a vector as little-endian 32-bit floats.

    :param length: the numbers that it must have.
    :raises ValueError: it is none, has another length, or a number that is not finite; the message says which.
    """
    if isinstance(vector, bytes):
        raw = vector
        if len(raw) != length * _FLOAT_BYTES:
            raise ValueError(f"with {len(raw)} bytes; expected {length} floats of {_FLOAT_BYTES} bytes")
    elif not isinstance(vector, Sequence) or isinstance(vector, str):
        raise ValueError(f"of type {type(vector).__name__}: expected numbers, or the bytes of floats")
    elif len(vector) != length:
        raise ValueError(f"with {len(vector)} dimensions; expected {length}")
    else:
        try:
            raw = struct.pack(f"<{length}f", *vector)
        except (struct.error, OverflowError) as error:
            raise ValueError(f"with a number that is no 32-bit float ({error})") from None
    highest = raw[_FLOAT_BYTES - 1 :: _FLOAT_BYTES]
    # Almost never: looking for two bytes takes a hundredth of the time of looking at each number.
    if any(byte in highest for byte in _HUGE) and not all(map(math.isfinite, struct.unpack(f"<{length}f", raw))):
        raise ValueError("with a number that is not finite")
    return raw
