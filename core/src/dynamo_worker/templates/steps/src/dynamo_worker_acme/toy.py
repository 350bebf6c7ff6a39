"""A toy in the place of an engine: it answers every prompt in capital letters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Of the tokenizer in `model/`: the mark between prompt and answer in the chat template, the end of an answer, and the
#: first of 256 tokens that each stand for a byte.
ANSWER_TOKEN, END_TOKEN, FIRST_BYTE_TOKEN = 0, 1, 3
#: Seconds of a step whose rate is not limited.
_SHORTEST_STEP = 0.001


# YOUR ENGINE HERE. Put your engine into these methods; nothing else in this package knows the toy. All of them run
# in one thread and may block: a step is one pass of the model over all requests in progress.
class Toy:
    """Requests in progress. Each has a key that the caller chooses, such as a number.

    :param tokens_per_second: of each request; 0 for as fast as possible.
    """

    def __init__(self, tokens_per_second: float) -> None:
        """Load the model. May raise whatever says why it cannot."""
        self._step_seconds = 1 / tokens_per_second if tokens_per_second else _SHORTEST_STEP
        self._jobs: dict[Any, _Job] = {}

    def add(self, key: Any, prompt: list[int], parameters: Mapping[str, Any]) -> None:
        """Take a request: its tokens, and its parameters as `translation.TABLE` names them.

        May raise: then only this request fails, with HTTP 400 if it is an `InvalidRequestError`.
        """
        self._jobs[key] = _Job(prompt, parameters)

    def abort(self, key: Any) -> None:
        """Forget a request; it may be finished."""
        self._jobs.pop(key, None)

    def step(self) -> dict[Any, tuple[int, str | None]]:
        """Return the next token of each request, with its finish reason if it is the last one.

        May raise: then the engine is dead, the worker ends, and its requests move to other workers.
        """
        time.sleep(self._step_seconds)
        outputs = {key: job.step() for key, job in self._jobs.items()}
        for key, (_, reason) in outputs.items():
            if reason is not None:
                del self._jobs[key]
        return outputs

    def close(self) -> None:
        """Free what the model holds."""


@dataclass
class _Job:
    prompt: list[int]
    parameters: Mapping[str, Any]
    made: int = 0

    def step(self) -> tuple[int, str | None]:
        token = self._next_token()
        self.made += 1
        stops = list(self.parameters.get("stop_token_ids", ()))
        if not self.parameters.get("ignore_eos"):
            stops.append(END_TOKEN)
        if token in stops and self.made >= self.parameters.get("min_tokens", 0):
            return token, "stop"
        return token, "length" if self.made >= self.parameters["max_tokens"] else None

    def _next_token(self) -> int:
        """Return the next token of the sequence.

        A request that moves here from another worker has the first part of its answer behind the mark, and goes on
        there. A real model does so by itself.
        """
        text, before = self.prompt, 0
        if ANSWER_TOKEN in text:
            mark = len(text) - 1 - text[::-1].index(ANSWER_TOKEN)
            text, before = text[:mark], len(text) - mark - 1
        at = (before + self.made) % (len(text) + 1)
        return END_TOKEN if at == len(text) else _capital(text[at])


def _capital(token: int) -> int:
    byte = token - FIRST_BYTE_TOKEN
    return token - 32 if ord("a") <= byte <= ord("z") else token
