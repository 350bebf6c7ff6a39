"""Requests and answers of the checks, in the form that an engine takes and gives: tokens, text or embeddings."""

from __future__ import annotations

import copy
import itertools
import math
import struct
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_worker.engine import EngineInfo

    CheckT = TypeVar("CheckT")

#: Names of OpenAI's API for fields of Dynamo's requests.
_RENAMED = {"guided_decoding": "response_format"}


class Dialect(Protocol):
    """How one kind of request is made, and its answers read."""

    @property
    def kind(self) -> str:
        """What the engine takes and gives: ``tokens``, ``text`` or ``embeddings``."""

    @property
    def streams(self) -> bool:
        """Whether an answer has chunks before its last one."""

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary.

        :param tokens: ``max_tokens``.
        :param prompt: different numbers have different prompts; 0 is the canary's.
        :param sections: more fields, by section of Dynamo's request.
        """

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with a prompt that is longer by so many tokens."""

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to; None if it has nothing of an answer."""

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""

    def content(self, chunks: Sequence[Any], index: int) -> Any:
        """Return what one answer says: its tokens or its text."""

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the token counts of an answer; None if it has none."""

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of an answer's tokens."""

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:
        """Return the number of a prompt's tokens; None if only the engine can tell."""


class Tokens:
    """Dynamo's own requests and chunks."""

    kind = "tokens"
    streams = True

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary."""
        request = dict(canary)
        if prompt:
            request["token_ids"] = _prompt(list(canary["token_ids"]), prompt, info)
        given: dict[str, Mapping[str, Any]] = {
            **sections,
            "stop_conditions": {"max_tokens": tokens, "ignore_eos": True, **sections.get("stop_conditions", {})},
        }
        for section, values in given.items():
            request[section] = {**(request.get(section) or {}), **values}
        return request

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with the first token of its prompt so many times more."""
        prompt = request["token_ids"]
        return {**request, "token_ids": [*([prompt[0]] * tokens), *prompt]}

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""
        return (request.get("stop_conditions") or {}).get("max_tokens")

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to."""
        return chunk.get("index") or 0

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""
        return chunk.get("finish_reason")

    def content(self, chunks: Sequence[Any], index: int) -> list[int]:
        """Return the tokens of one answer."""
        mine = [chunk for chunk in chunks if isinstance(chunk, dict) and self.index(chunk) == index]
        return [token for chunk in mine for token in chunk.get("token_ids") or ()]

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the token counts in the last chunk."""
        last = chunks[-1] if chunks else None
        return last.get("completion_usage") if isinstance(last, dict) else None

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of tokens in the first answer."""
        return len(self.content(chunks, 0))

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:
        """Return the number of a prompt's tokens."""
        return len(request["token_ids"])


def _prompt(canary: list[int], number: int, info: EngineInfo | None) -> list[int]:
    """Return a prompt of its own for each number: the canary's, with other tokens in front."""
    first = max(canary[0], 3)
    limit = info.vocab_size if info is not None and info.vocab_size else first + 100
    room = max(1, min(limit, 250) - first)
    return [first + (number * 11 + at * 3) % room for at in range(5)] + canary[1:]


class Text:
    """Requests and chunks of OpenAI's APIs; without a stream, so that token counts come unasked."""

    kind = "text"
    streams = True

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,  # noqa: ARG002 - any dialect
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary; the fields of all sections lie beside each other."""
        request = {name: value for name, value in copy.deepcopy(dict(canary)).items() if name not in _LIMITS}
        request |= {"stream": False, "max_tokens": tokens}
        request.pop("stream_options", None)
        if prompt:
            words = "".join(chr(ord("a") + (prompt * 11 + at * 3) % 26) for at in range(5))
            if "messages" in request:
                request["messages"][-1] = {**request["messages"][-1], "content": words}
            else:
                request["prompt"] = words
        for values in sections.values():
            request |= {_RENAMED.get(name, name): value for name, value in values.items()}
        return request

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request with so many words more; a word is a token or more."""
        longer = copy.deepcopy(dict(request))
        words = "word " * tokens
        if "messages" in longer:
            longer["messages"][-1]["content"] = f"{words}{longer['messages'][-1]['content']}"
        else:
            longer["prompt"] = f"{words}{longer['prompt']}"
        return longer

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return a request's ``max_tokens``."""
        return next((request[name] for name in _LIMITS if request.get(name) is not None), None)

    def index(self, chunk: Mapping[str, Any]) -> object:
        """Return the answer that a chunk belongs to; None for one with token counts only."""
        return next((choice.get("index") for choice in _choices(chunk)), None)

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return a chunk's finish reason."""
        return next((c["finish_reason"] for c in _choices(chunk) if c.get("finish_reason") is not None), None)

    def content(self, chunks: Sequence[Any], index: int) -> str:
        """Return the text of one answer."""
        return "".join(self.texts(chunks, index))

    def texts(self, chunks: Sequence[Any], index: int = 0) -> list[str]:
        """Return the text of each chunk of one answer that has some."""
        found = []
        for choice in (choice for chunk in chunks for choice in _choices(chunk) if choice.get("index") == index):
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("reasoning_content") or delta.get("content")
            if isinstance(text, str) and text:
                found.append(text)
        return found

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the last token counts."""
        counts = [chunk["usage"] for chunk in chunks if isinstance(chunk, dict) and chunk.get("usage")]
        return counts[-1] if counts else None

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of tokens that the engine has counted; skip the check if it has not."""
        usage = self.usage(chunks)
        if not isinstance(usage, dict) or type(usage.get("completion_tokens")) is not int:
            if any(self.reason(chunk) is not None for chunk in chunks if isinstance(chunk, dict)):
                pytest.skip("the engine reports no usage")
            return 0
        made: int = usage["completion_tokens"]
        return made

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:  # noqa: ARG002 - any dialect
        """Return None: only the engine can tell."""
        return None


#: Where a text request has its ``max_tokens``.
_LIMITS = ("max_completion_tokens", "max_tokens")


def _choices(chunk: Any) -> list[dict[str, Any]]:
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


class Embeddings:
    """Requests for embeddings. Its length in tokens is that of the inputs, which are token ids for every engine."""

    kind = "embeddings"
    streams = False

    def request(
        self,
        canary: Mapping[str, Any],
        tokens: int,
        prompt: int,
        info: EngineInfo | None,
        sections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return a request made from a canary; more fields of any section make it a wrong one.

        :param tokens: tokens of all inputs together; several inputs if one would be too long.
        """
        longest = _LONGEST_INPUT if info is None else min(info.context_length or _LONGEST_INPUT, _LONGEST_INPUT)
        first = canary["inputs"][0]
        start = first if isinstance(first, list) else [_ANY_TOKEN]
        pattern = _prompt(start, prompt, info) if prompt else start
        whole = list(itertools.islice(itertools.cycle(pattern), tokens))
        inputs = [whole[at : at + longest] for at in range(0, tokens, longest)]
        return {**canary, "inputs": inputs, **({"dimensions": dict(sections)} if sections else {})}

    def lengthened(self, request: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Return a request whose first input begins with its first token so many times more."""
        first, *others = request["inputs"]
        return {**request, "inputs": [[*([first[0]] * tokens), *first], *others]}

    def limit(self, request: Mapping[str, Any]) -> object:
        """Return the number of a request's inputs: the canary has one."""
        return len(request["inputs"])

    def index(self, chunk: Mapping[str, Any]) -> object:  # noqa: ARG002 - any dialect
        """Return 0: there is one answer."""
        return 0

    def reason(self, chunk: Mapping[str, Any]) -> Any:
        """Return ``length`` for a whole answer: it ends because the inputs do."""
        return "length" if chunk.get("embeddings") is not None else None

    def content(self, chunks: Sequence[Any], index: int) -> Vectors:  # noqa: ARG002 - any dialect
        """Return the vectors."""
        return Vectors(
            numbers(vector) for chunk in chunks if isinstance(chunk, dict) for vector in chunk.get("embeddings") or ()
        )

    def usage(self, chunks: Sequence[Any]) -> dict[str, Any] | None:
        """Return the count of the inputs' tokens."""
        return next(
            ({"prompt_tokens": chunk.get("prompt_tokens")} for chunk in chunks if isinstance(chunk, dict)), None
        )

    def made(self, chunks: Sequence[Any]) -> int:
        """Return the number of the inputs' tokens that the engine has counted."""
        return int((self.usage(chunks) or {}).get("prompt_tokens") or 0)

    def prompt_tokens(self, request: Mapping[str, Any]) -> int | None:
        """Return the number of the inputs' tokens; None if one is text."""
        inputs = request["inputs"]
        return None if any(isinstance(one, str) for one in inputs) else sum(map(len, inputs))


#: Longest input of a request that is made of many tokens.
_LONGEST_INPUT = 256
#: A token that every vocabulary has, for an engine whose canary is text.
_ANY_TOKEN = 5
#: How far the numbers of two vectors may lie apart, relative to the longer vector: engines compute requests in batches,
#: whose size changes the order of additions.
_CLOSE = 0.01


class Vectors(list[tuple[float, ...]]):
    """Vectors that are equal to others if their numbers are close."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vectors) and len(self) == len(other) and all(map(_close, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return f"[{', '.join(str([round(number, 4) for number in vector[:4]]) for vector in self[:3])}, …]"


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    if len(one) != len(other):
        return False
    allowed = _CLOSE * max(math.hypot(*one), math.hypot(*other))
    return all(abs(first - second) <= allowed for first, second in zip(one, other, strict=True))


def numbers(vector: Any) -> tuple[float, ...]:
    """Return a vector of an answer as numbers; nothing if it is none."""
    if isinstance(vector, bytes):
        return struct.unpack(f"<{len(vector) // 4}f", vector[: len(vector) // 4 * 4])
    return tuple(vector) if isinstance(vector, (list, tuple)) else ()


def dialect_of(request: Mapping[str, Any]) -> Dialect:
    """Return the dialect of a request, such as an engine's canary."""
    if "inputs" in request:
        return Embeddings()
    return Tokens() if "token_ids" in request else Text()


def only(*kinds: str) -> Callable[[CheckT], CheckT]:
    """Mark a check, or a class of checks, that concerns engines of these kinds only (:attr:`Dialect.kind`)."""

    def mark(check: CheckT) -> CheckT:
        for part in vars(check).values() if isinstance(check, type) else [check]:
            if callable(part):
                part.kinds = kinds
        return check

    return mark


def skip_others(check: Any, dialect: Dialect) -> None:
    """Skip a check that does not concern an engine of this dialect."""
    if dialect.kind not in getattr(check, "kinds", (dialect.kind,)):
        pytest.skip(f"the engine is one of {dialect.kind}")
