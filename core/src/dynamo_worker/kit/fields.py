"""Readers for the fields of a request: each returns one value checked, or refuses it by the field's full name.

They run on the event loop, so whatever a client can make long has a limit (``request_limits.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from dynamo_worker.errors import InvalidRequestError, shown
from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.json_schema import check_size

#: Reads one value of a request and returns it for the engine. Takes the field's full name for its error message.
Reader = Callable[[str, Any], Any]

#: A request for the log-probabilities of the whole vocabulary: -1, which the frontend sends as an unsigned number.
_WHOLE_VOCABULARY: Final = 2**32 - 1
#: Smallest repetition penalty: logits are divided by it, and 1e-40 makes them infinite.
_LEAST_PENALTY: Final = 1e-3
#: Longest token id as text, longer than any 64-bit integer.
_LONGEST_ID: Final = 20


def section(request: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return one object of a request, however deeply nested; empty if it is missing or null.

    :raises InvalidRequestError: the value is not an object.
    """
    current: Any = request
    for name in names:
        current = current.get(name)
        if current is None:
            return {}
        if not isinstance(current, Mapping):
            raise refusal(name, "an object", current)
    found: Mapping[str, Any] = current
    return found


def refusal(name: str, expected: str, value: object) -> InvalidRequestError:
    """Return the error for a value of the wrong type or out of range."""
    return InvalidRequestError(f"{name}: expected {expected}, got {shown(value)}")


def integer(name: str, value: Any) -> int:
    """Read a 64-bit integer; accept a float without a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise refusal(name, "a 64-bit integer", value)
    return value


def number(name: str, value: Any) -> float:
    """Read a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(name, "a finite number", value)
    try:
        read = float(value)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise refusal(name, "a finite number", value)
    return read


def number_within(least: float, most: float) -> Reader:
    """Return the reader of a number from ``least`` to ``most``, for engines that fail on others."""

    def read(name: str, value: Any) -> float:
        read = number(name, value)
        if not least <= read <= most:
            raise refusal(name, f"a number from {least:g} to {most:g}", value)
        return read

    return read


def boolean(name: str, value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise refusal(name, "true or false", value)
    return value


def string(name: str, value: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise refusal(name, "a string", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Read an object that the engine gets unchanged."""
    if not isinstance(value, Mapping):
        raise refusal(name, "an object", value)
    check_size(name, value)
    return dict(value)


def token_ids(name: str, value: Any) -> list[int]:
    """Read a short list of token ids, such as stop tokens."""
    return _token_ids(name, value, limits.STOP_TOKENS)


def allowed_token_ids(name: str, value: Any) -> list[int]:
    """Read a list of token ids that may be as long as the vocabulary."""
    return _token_ids(name, value, limits.ALLOWED_TOKENS)


def _token_ids(name: str, value: Any, limit: limits.Limit) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise refusal(name, "a list of integers", value)
    limit.check(name, len(value))
    if set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**63:
        return list(value)  # takes a tenth of the time of the next line
    return [integer(name, token) for token in value]


def answer_count(name: str, value: Any) -> int:
    """Read the number of answers."""
    count = integer(name, value)
    if count < 1:
        raise refusal(name, "a positive integer", value)
    limits.ANSWERS.check(name, count)
    return count


def rank(name: str, value: Any) -> int | None:
    """Read a data-parallel rank, a 32-bit number in Dynamo; None stays None."""
    if value is None:
        return None
    read = integer(name, value)
    if not 0 <= read < 2**32:
        raise refusal(name, "a data-parallel rank", value)
    return read


def logprob_count(name: str, value: Any) -> int:
    """Read the number of log-probabilities per token; -1 asks for the whole vocabulary."""
    count = integer(name, value)
    if count == _WHOLE_VOCABULARY:
        return -1
    if count < -1:
        raise refusal(name, "-1 or a number of tokens", value)
    return count


def logprobs_per_token(name: str, count: int, vocabulary: int) -> int:
    """Return the number that :func:`logprob_count` has read, where the whole vocabulary is not -1; limited."""
    number = vocabulary if count < 0 else count
    limits.LOGPROBS.check(name, number)
    return number


def token_count(name: str, value: Any) -> int:
    """Read a number of tokens or the like, for which engines use 32 bits."""
    count = integer(name, value)
    if not 0 <= count < 2**31:
        raise refusal(name, "a number of tokens", value)
    return count


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Read the biases added to the logits of tokens, clipped to -100…100 as in the OpenAI API."""
    if not isinstance(value, Mapping):
        raise refusal(name, "an object of token ids and numbers", value)
    limits.BIASES.check(name, len(value))
    try:
        # Parsing a number takes time quadratic in its length.
        if any(isinstance(token, str) and len(token) > _LONGEST_ID for token in value):
            raise ValueError
        ids = [int(token) for token in value]
    except (TypeError, ValueError, OverflowError):
        raise refusal(name, "an object of token ids and numbers", value) from None
    if ids and not -(2**31) <= min(ids) <= max(ids) < 2**31:
        raise refusal(name, "an object of token ids and numbers", value)
    return {token: min(100.0, max(-100.0, number(name, bias))) for token, bias in zip(ids, value.values(), strict=True)}


def repetition_penalty(name: str, value: Any) -> float:
    """Read the divisor for the logits of tokens seen before; engines refuse 0 and below themselves."""
    read = number(name, value)
    if 0 < read < _LEAST_PENALTY:
        raise refusal(name, f"a number of at least {_LEAST_PENALTY:g}", value)
    return read


def unsupported(*harmless: object) -> Reader:
    """Return the reader of a field that the engine does not support; the ``harmless`` values ask for nothing."""

    def read(name: str, value: Any) -> None:
        if value not in harmless:
            raise InvalidRequestError(f"{name} = {shown(value)} is not supported by this engine")

    return read
