"""From SGLang's outputs to Dynamo's chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from dynamo.llm.exceptions import Disconnected

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import answer
from dynamo_worker.kit.chunks import finite, no_text, prompt_logprob, top_logprob, usage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from dynamo_worker import Chunk
    from dynamo_worker.engine import Send

_BAD_REQUEST: Final = 400


class Answer(answer.Answer):
    """One answer to one request: turns SGLang's outputs into chunks and sends them.

    It replaces the event that wakes the reader of a request: SGLang calls :meth:`set` after it has put outputs into the
    request's list, and they are sent right there, without waking a task.

    :ivar plain: whether the answer consists of tokens and nothing else.
    """

    def __init__(
        self,
        send: Send,
        *,
        index: int = 0,
        prompt_tokens: int,
        stop_tokens: Collection[int] = (),
        top: int | None = None,
        prompt_top: int | None = None,
        decode: Callable[[int], str | None] = no_text,
    ) -> None:
        """Start an answer.

        :param index: number of the answer.
        :param stop_tokens: the client's stop tokens; only these are reported as the stop reason.
        :param top: number of likeliest tokens reported with each, negative for all; None for no log-probabilities.
        :param prompt_top: the same for the prompt.
        :param decode: returns the text of a token.
        """
        super().__init__(send)
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._stop_tokens = stop_tokens
        self._top = top
        self._prompt_top = prompt_top
        self._decode = decode
        self._completion_tokens = 0
        self._state: Any = None
        #: Whether the scheduler has the request.
        self.submitted = False
        self.plain = top is None and prompt_top is None

    def follow(self, state: Any) -> None:
        """Take the place of the event in SGLang's record of the request."""
        self._state = state
        state.event = self

    def set(self) -> None:
        """Send the outputs in the request's list."""
        outputs, self._state.out_list = self._state.out_list, []
        for output in outputs:
            meta = output["meta_info"]
            self.add(output["output_ids"], meta.get("finish_reason"), meta.get("cached_tokens"), meta)

    def clear(self) -> None:
        """Do nothing: the outputs have been sent."""

    def add(
        self,
        tokens: Sequence[int],
        reason: Mapping[str, Any] | None,
        cached_tokens: int | None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Send new tokens.

        :param reason: why these are the last ones; None if they are not.
        :param cached_tokens: tokens of the prompt that were in the KV cache.
        :param meta: SGLang's further information about the tokens, unless the answer is plain.
        """
        if self.over:
            return
        try:
            chunk: Chunk = {"token_ids": list(tokens), "index": self._index}
            self._completion_tokens += len(tokens)
            if meta is not None and self._top is not None and tokens:
                self._add_logprobs(chunk, meta)
            if reason is not None:
                if reason["type"] == "abort":
                    self._aborted(chunk, reason)
                else:
                    chunk["finish_reason"] = reason["type"]
                    if reason.get("matched") in self._stop_tokens:
                        chunk["stop_reason"] = reason["matched"]
                chunk["completion_usage"] = usage(self._prompt_tokens, self._completion_tokens, cached_tokens)
                if meta is not None and self._prompt_top is not None:
                    chunk["engine_data"] = {"prompt_logprobs": self._prompt_logprobs(meta)}
            self.send(chunk)
        except Exception as error:  # such as a client that is gone; the other answers go on
            self.fail(error)
        else:
            self.begun.set()
            if reason is not None:
                self.complete()

    @staticmethod
    def _aborted(chunk: Chunk, reason: Mapping[str, Any]) -> None:
        if reason.get("status_code") is not None:
            raise _refusal(reason)
        # Aborted by an operator or by the worker: the answer is not read.
        chunk["finish_reason"] = "cancelled"
        chunk["token_ids"] = []

    def _add_logprobs(self, chunk: Chunk, meta: Mapping[str, Any]) -> None:
        chosen = meta.get("output_token_logprobs") or ()
        if len(chosen) != len(chunk["token_ids"]):  # the lists would not match the tokens
            return
        chunk["log_probs"] = [finite(logprob) for logprob, *_ in chosen]
        likeliest: Sequence[Any] = meta.get("output_top_logprobs") or ([],) * len(chosen)
        chunk["top_logprobs"] = [
            [
                top_logprob(token, logprob, rank, self._decode(token))
                for rank, (logprob, token, *_) in enumerate(_first(position, self._top), start=1)
            ]
            for position in likeliest
        ]

    def _prompt_logprobs(self, meta: Mapping[str, Any]) -> list[Any]:
        """Return the entries of each token of the prompt, None for the first."""
        chosen = meta.get("input_token_logprobs") or ()
        likeliest = meta.get("input_top_logprobs") or (None,) * len(chosen)
        positions: list[Any] = []
        for (logprob, token, *_), top in zip(chosen, likeliest, strict=False):
            if logprob is None:
                positions.append(None)
                continue
            entries = {
                str(other): prompt_logprob(value, rank, self._decode(other))
                for rank, (value, other, *_) in enumerate(_first(top, self._prompt_top), start=1)
            }
            entries.setdefault(str(token), prompt_logprob(logprob, None, self._decode(token)))
            positions.append(entries)
        return positions


class Vector(answer.Answer):
    """The embedding of one input, on its way: takes SGLang's output, as :class:`Answer` does.

    :ivar numbers: the vector; empty until it is there.
    :ivar prompt_tokens: the input's length in tokens.
    """

    #: Nothing comes with it.
    plain: ClassVar = True

    def __init__(self) -> None:
        super().__init__(lambda _: None)
        self._state: Any = None
        #: Whether the scheduler has the request.
        self.submitted = False
        self.numbers: Sequence[float] = ()
        self.prompt_tokens = 0

    def follow(self, state: Any) -> None:
        """Take the place of the event in SGLang's record of the request."""
        self._state = state
        state.event = self

    def set(self) -> None:
        """Take the output in the request's list."""
        outputs, self._state.out_list = self._state.out_list, []
        for output in outputs:
            meta = output["meta_info"]
            self.add(output["embedding"], meta.get("finish_reason"), meta["prompt_tokens"])

    def clear(self) -> None:
        """Do nothing: the output has been taken."""

    def add(self, numbers: Sequence[float], reason: Mapping[str, Any] | None, prompt_tokens: int) -> None:
        """Take the vector.

        :param reason: why it is complete; None if it is not.
        """
        if reason is None or self.over:
            return
        if reason["type"] == "abort":
            self.fail(_refusal(reason))
            return
        self.numbers, self.prompt_tokens = numbers, prompt_tokens
        self.complete()


def _refusal(reason: Mapping[str, Any]) -> Exception:
    """Return the error that tells the client why SGLang has ended its request."""
    message = reason.get("message") or "aborted"
    if reason.get("status_code") == _BAD_REQUEST:
        return InvalidRequestError(message)
    # Not EngineShutdown, which takes the whole worker out of the frontends' rotation for 5 s (measured).
    return Disconnected(f"SGLang ended the request: {message}")


def _first(entries: Sequence[Any] | None, number: int | None) -> Sequence[Any]:
    """Return the first entries, all of them if the number is negative."""
    if not entries or number is None:
        return ()
    return entries if number < 0 else entries[:number]
