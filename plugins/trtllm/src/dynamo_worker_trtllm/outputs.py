"""From TensorRT-LLM's results to Dynamo's chunks, sent right where TensorRT-LLM reports a step.

Its dispatcher puts every step of a request into the request's queue and sets the queue's event on the event loop, which
would wake a task for each token of each request. :class:`Answers` takes the place of the event and sends the chunks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Disconnected
from tensorrt_llm.executor.utils import EngineDeadError as TrtllmDeadError
from tensorrt_llm.executor.utils import ErrorResponse, RequestError

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.kit import device_errors
from dynamo_worker.kit.chunks import ChunkBuilder
from dynamo_worker.kit.in_flight import TrackedAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.engine import Send

#: Dynamo's names of TensorRT-LLM's finish reasons. ``not_finished`` ends a prefill whose decode is elsewhere.
FINISH_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "cancelled", "not_finished": "stop"}
#: An error about the request itself: another worker would refuse it too.
_OF_THE_REQUEST: Final = re.compile(
    "exceed|invalid|not supported|unsupported|must be|should be|too (long|large|many)|larger than|greater than",
    re.IGNORECASE,
)


class Answers(TrackedAnswer[Any]):
    """All answers to one request, in place of the event of the request's queue."""

    def __init__(
        self,
        send: Send,
        *,
        hand_over: Callable[[Any], dict[str, Any]] | None = None,
        on_step: Callable[[Any], None] = lambda _: None,
        **request: Any,
    ) -> None:
        """Start the answers.

        :param hand_over: returns what a decode worker needs from TensorRT-LLM's description of a prefill; None on
            other workers.
        :param on_step: called with TensorRT-LLM's result after every step of the engine for this request.
        :param request: what the answers need to know about the request, as :class:`ChunkBuilder` takes it.
        """
        super().__init__(send)
        self._chunks = ChunkBuilder("TensorRT-LLM", FINISH_REASONS, **request)
        self._hand_over = hand_over
        self._on_step = on_step
        self._result: Any = None
        #: Number of tokens sent of each answer, and the answers that have ended.
        self._sent: dict[int, int] = {}
        self._ended: set[int] = set()

    def follow(self, result: Any) -> None:
        """Report the results: those that are there already, and from now on every one as it arrives."""
        self._result = result
        result.aqueue._event = self  # noqa: SLF001 - TensorRT-LLM has no public way to be told
        self.set()

    def set(self) -> None:
        """Send what is in the queue."""
        result, queue = self._result, self._result.aqueue
        while not (queue.empty() or self.finished.is_set()):
            entry = queue._q[0]  # noqa: SLF001
            error = entry[0] if type(entry) is tuple else entry
            try:
                if isinstance(error, (ErrorResponse, BaseException)):
                    # TensorRT-LLM would shut its executor down right here, on the event loop, if it is a fatal one.
                    self.give_up(translated(getattr(error, "error_msg", error)))
                else:
                    result.__anext__().send(None)  # never waits: the queue has an entry
            except StopIteration:
                self._report(result)
            except StopAsyncIteration:
                self.give_up(Disconnected("TensorRT-LLM ended the request without a last token"))
            except Exception as failure:  # about this request; the others go on
                self.give_up(translated(failure))

    def clear(self) -> None:
        """Do nothing: what was in the queue has been sent."""

    def _report(self, result: Any) -> None:
        self._on_step(result)
        if result.finished:
            self.finished.set()
        try:
            for output in () if self.over else result.outputs:
                self._add(result, output)
        except Exception as error:  # such as a client that is gone; the engine's steps are still read
            self.fail(error)
        self.begun.set()
        if result.finished:
            self.complete()

    def _add(self, result: Any, output: Any) -> None:
        """Send the new tokens of one answer: TensorRT-LLM's list has all of them, and the last step may shorten it."""
        index, tokens, reason = output.index, output.token_ids, output.finish_reason
        sent = self._sent.get(index, 0)
        if index in self._ended or (len(tokens) <= sent and reason is None):
            return
        chunk = self._chunks.chunk(index, tokens[sent:], output.logprobs[sent : len(tokens)])
        self._sent[index] = max(sent, len(tokens))
        if reason is not None:
            self._ended.add(index)
            self._chunks.finish(chunk, reason, output.stop_reason, result.cached_tokens, output.prompt_logprobs)
            if self._hand_over is not None and reason != "cancelled":
                chunk["disaggregated_params"] = self._hand_over(output.disaggregated_params)
        self.send(chunk)


def translated(error: Any) -> BaseException:
    """Return the error that tells the worker and the client what an error of TensorRT-LLM means.

    :param error: an exception, or the text of one.
    """
    if isinstance(error, (EngineDeadError, InvalidRequestError, Disconnected)):
        return error
    if isinstance(error, TrtllmDeadError):
        return EngineDeadError(f"TensorRT-LLM reports that its engine is dead: {error}")
    text = str(error) or type(error).__name__
    if device_errors.is_gone(text):
        return EngineDeadError(f"TensorRT-LLM reports a lost device: {text}")
    if isinstance(error, (str, RequestError)) and _OF_THE_REQUEST.search(text):
        return InvalidRequestError(text)
    # No error of one request ends the worker: what has befallen the ranks is for their pidfds and the health check.
    return Disconnected(f"TensorRT-LLM ended the request: {text}")
