"""Requests with the prompt as tokens: ``PreprocessedRequest`` of Dynamo."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, cast

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.host.requests.engine_checks import AnswerCheck, OtherKindError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.engine import Generate, Push, Request
    from dynamo_worker.host.requests.engine_checks import EngineChecks

#: Upper limit of token ids for a model whose vocabulary is unknown.
_TOKEN_LIMIT = 2**31
#: Size of a packed token in bytes.
_PACKED_BYTES = 4


class TokenRequests:
    """The kind of requests of an engine that takes tokens.

    :param vocab_size: number of token ids that the engine knows; None if only the engine can tell.
    :param context_length: longest sequence in tokens; None if only the engine can tell.
    """

    name = "tokens"
    migrates = True

    def __init__(self, vocab_size: int | None = None, context_length: int | None = None) -> None:
        self._vocab_size = vocab_size
        self._context_length = context_length

    def checked(self, request: Any) -> Request:
        """Return the request with its tokens unpacked.

        :raises InvalidRequestError: see :func:`validated`.
        """
        return validated(request, self._vocab_size, self._context_length)

    def guarded(self, generate: Generate) -> Generate:
        """Return ``generate``: the frontend notices an answer that is not complete."""
        return generate

    def guarded_push(self, push: Push) -> Push:
        """Return ``push``, for the same reason."""
        return push

    def first_answer(self, checks: EngineChecks, request: Mapping[str, Any]) -> AnswerCheck:  # noqa: ARG002 - any kind
        """Return the check of the engine's answer to its canary request."""
        return AnswerCheck(checks, self._vocab_size)


def validated(request: Any, vocab_size: int | None = None, context_length: int | None = None) -> Request:
    """Return the request with ``token_ids`` unpacked into a list of ints, if an engine can serve it.

    Frontends may send ``token_ids`` as packed little-endian int32 (``DYN_TOKEN_IDS_AS_BYTES``).

    :param vocab_size: number of token ids that the engine knows; None if only the engine can tell.
    :param context_length: longest sequence in tokens; the tokens of a longer prompt are not even read.
    :raises OtherKindError: it is a request with text.
    :raises InvalidRequestError: it is not an object, or its tokens are missing, empty, too many or not token ids.
    """
    if not isinstance(request, dict):
        raise InvalidRequestError(f"expected a request object, got {type(request).__name__}")
    tokens = request.get("token_ids")
    if tokens is None and not request.keys().isdisjoint(("messages", "prompt")):
        raise OtherKindError("this worker takes tokens, and the request is text")
    if (tokens is None and "input" in request) or (isinstance(tokens, list) and tokens and type(tokens[0]) is list):
        raise InvalidRequestError("this worker generates tokens, and the request asks for embeddings")
    request["token_ids"] = tokens = unpacked("token_ids", tokens, context_length, "the prompt")
    check_ids("token_ids", tokens, vocab_size)
    return cast("Request", request)


def unpacked(name: str, tokens: Any, context_length: int | None, what: str) -> list[int]:
    """Return tokens as a list of ints.

    :param name: the field's name, and ``what`` it is, for messages.
    :raises InvalidRequestError: they are too many, or no integers.
    """
    if context_length is not None and isinstance(tokens, (list, bytes, bytearray, memoryview)):
        length = len(tokens) if isinstance(tokens, list) else len(tokens) // _PACKED_BYTES
        if length > context_length:
            raise InvalidRequestError(f"{what} has {length} tokens; the model's context length is {context_length}")
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        packed = array("i")
        try:
            packed.frombytes(tokens)
        except ValueError:
            raise InvalidRequestError(
                f"{name}: expected packed 32-bit integers, got {len(tokens)} bytes, which is not a multiple of 4"
            ) from None
        return packed.tolist()
    if not isinstance(tokens, list):
        raise InvalidRequestError(f"{name}: expected a list of integers, got {type(tokens).__name__}")
    if not set(map(type, tokens)) <= {int}:  # isinstance would accept booleans
        wrong = next(token for token in tokens if type(token) is not int)
        raise InvalidRequestError(f"{name}: expected integers, got {shown(wrong)}")
    return tokens


def check_ids(name: str, tokens: list[int], vocab_size: int | None) -> None:
    """Check that integers are token ids.

    :param name: the field's name, for the message.
    :raises InvalidRequestError: there are none, or one is outside of the vocabulary.
    """
    if not tokens:
        raise InvalidRequestError(f"{name}: the prompt is empty")
    if (lowest := min(tokens)) < 0:
        raise InvalidRequestError(f"{name}: {lowest} is negative")
    if (highest := max(tokens)) >= (_TOKEN_LIMIT if vocab_size is None else vocab_size):
        limit = "a 32-bit integer" if vocab_size is None else f"in the model's vocabulary of {vocab_size} tokens"
        raise InvalidRequestError(f"{name}: {highest} is not {limit}")
