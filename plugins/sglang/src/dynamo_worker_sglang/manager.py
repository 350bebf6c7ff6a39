"""The parts of SGLang that run inside the worker, without those that would control the worker's life.

SGLang's own :class:`Engine` kills the whole process some seconds after one of its children dies, replaces the signal
handlers, and on shutdown kills everything below this process. Here the worker learns from the kernel what happens to
SGLang's processes, and decides itself what follows.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import signal
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.entrypoints import engine as entrypoint
from sglang.srt.managers.io_struct import (
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    EmbeddingReqInput,
    GenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.engine_lifecycle import start_error
from dynamo_worker.logs import get_logger
from dynamo_worker_sglang import scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from sglang.srt.server_args import ServerArgs

    from dynamo_worker_sglang.outputs import Answer, Vector

log = get_logger(__name__)


@dataclass
class GenerateRequest(GenerateReqInput):  # type: ignore[misc]
    """A request, and the answer that gets its outputs."""

    answer: Answer | None = None


@dataclass
class EmbeddingRequest(EmbeddingReqInput):  # type: ignore[misc]
    """A batch of inputs, and the vectors to which they become."""

    vectors: Sequence[Vector] = ()

    def __getitem__(self, number: int) -> Any:
        """Return one input as a request of its own, with its vector."""
        part = super().__getitem__(number)
        part.answer = self.vectors[number]
        return part


class Manager(TokenizerManager):  # type: ignore[misc]
    """Hands requests to the scheduler, and its outputs to the answers.

    It takes the place of the detokenizer, which is idle where the frontend makes the text: the scheduler's outputs come
    straight here, as with ``--skip-tokenizer-init``. Unlike with that flag, the scheduler keeps its tokenizer, which
    grammars and ``min_tokens`` need.

    :ivar batches: number of batches of outputs received.
    :ivar failure: why no more outputs will come, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = 0
        self.failure: str | None = None
        self._short_way = not (self.enable_metrics or self.enable_trace or self.request_logger.log_requests)

    def init_ipc_channels(self, port_args: Any) -> None:
        """Listen in place of the detokenizer."""
        super().init_ipc_channels(port_args)
        self.recv_from_detokenizer.bind(port_args.detokenizer_ipc_name)

    def auto_create_handle_loop(self) -> None:
        """Receive outputs on the running loop, without signal handlers and without killing the process on an error."""
        if self.event_loop is not None:
            return
        self.event_loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        task = asyncio.ensure_future(self.handle_loop())
        self.asyncio_tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("SGLang's outputs cannot be read", exc_info=error)
            self.fail(f"SGLang's outputs cannot be read: {type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        """End all requests, because no more outputs will come."""
        self.failure = self.failure or reason
        self._fail_answers(EngineDeadError(reason))

    async def end_requests(self, error: BaseException) -> None:
        """End all requests with an error, and stop the work for them."""
        self._fail_answers(error)
        self.abort_request(abort_all=True)

    def _fail_answers(self, error: BaseException) -> None:
        for state in list(self.rid_to_state.values()):
            answer = getattr(state.obj, "answer", None)
            if answer is not None:
                answer.fail(error)

    def stop(self) -> None:
        """Stop receiving."""
        for task in self.asyncio_tasks:
            task.cancel()

    # ------------------------------------------------------------------------------------------------- requests

    def _init_req_state(self, obj: Any, request: Any = None) -> None:
        super()._init_req_state(obj, request)
        if isinstance(obj, GenerateRequest) and obj.answer is not None:
            obj.answer.follow(self.rid_to_state[obj.rid])
        elif isinstance(obj, EmbeddingRequest):
            for rid, vector in zip(obj.rid, obj.vectors, strict=True):
                vector.follow(self.rid_to_state[rid])

    def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        answer = getattr(obj, "answer", None)
        if answer is not None:
            answer.submitted = True
            return _nothing_until_the_end(answer)
        stream: AsyncIterator[Any] = super()._wait_one_response(obj, request)
        return stream

    async def _handle_batch_request(self, obj: Any, *args: Any) -> AsyncIterator[Any]:
        if not isinstance(obj, EmbeddingRequest):
            async for outputs in super()._handle_batch_request(obj, *args):
                yield outputs
            return
        # As SGLang does with batches of tokens, without a task for each of them.
        if self._should_use_batch_tokenization(obj.batch_size, obj):
            await self._send_batch_request(await self._batch_tokenize_and_process(obj.batch_size, obj))
        else:
            for number in range(obj.batch_size):
                await self._send_one_request(await self._tokenize_one_request(obj[number]))
        for vector in obj.vectors:
            vector.submitted = True
        for vector in obj.vectors:
            await vector.wait()

    async def run(self, request: GenerateRequest | EmbeddingRequest) -> None:
        """Run one request until its answer is complete.

        :raises InvalidRequestError: SGLang rejects the request.
        """
        answer = _last_answer(request)
        if not self.is_pause or answer is None:
            await self._run(request)
            return
        # It waits for the end of the pause, where its answer's own end does not reach it.
        run = asyncio.ensure_future(self._run(request))
        end = asyncio.ensure_future(answer.wait())
        try:
            await asyncio.wait({run, end}, return_when=asyncio.FIRST_COMPLETED)
            await (end if end.done() and end.exception() is not None else run)
        finally:
            run.cancel()
            end.cancel()
            await asyncio.wait({run, end})

    async def _run(self, request: GenerateRequest | EmbeddingRequest) -> None:
        try:
            async for _ in self.generate_request(request):
                pass
        except ValueError as error:
            # SGLang rejects a request with this before the scheduler has it; afterwards it is a bug.
            answer = _last_answer(request)
            if answer is None or answer.submitted:
                raise
            raise InvalidRequestError(str(error)) from error

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background until :meth:`stop`."""
        task = asyncio.ensure_future(work)
        self.asyncio_tasks.add(task)
        task.add_done_callback(self.asyncio_tasks.discard)

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        self.batches += 1
        plain = isinstance(recv_obj, (BatchTokenIDOutput, BatchEmbeddingOutput))
        if not (self._short_way and plain and self._hand_out(recv_obj)):
            await super()._handle_batch_output(recv_obj)

    def _hand_out(self, batch: BatchTokenIDOutput | BatchEmbeddingOutput) -> bool:
        """Send the outputs of a batch of plain answers; return False if the batch contains any other answer.

        SGLang's own path makes a dozen objects for every token of every request.
        """
        states = [self.rid_to_state.get(rid) for rid in batch.rids]
        for state in states:
            if state is not None:
                answer = getattr(state.obj, "answer", None)
                if answer is None or not answer.plain:
                    return False
        made, counts = (
            (batch.embeddings, batch.prompt_tokens)
            if isinstance(batch, BatchEmbeddingOutput)
            else (batch.output_ids, batch.cached_tokens)
        )
        for position, (rid, state) in enumerate(zip(batch.rids, states, strict=True)):
            if state is None:
                continue  # it has been cancelled
            reason = batch.finished_reasons[position]
            if reason is not None:
                state.finished = True
                del self.rid_to_state[rid]
                if self.enable_lora and state.obj.lora_path:
                    self._keep(self.lora_registry.release(state.obj.lora_id))
            state.obj.answer.add(made[position], reason, counts[position])
        return True


def _last_answer(request: GenerateRequest | EmbeddingRequest) -> Answer | Vector | None:
    return request.answer if isinstance(request, GenerateRequest) else request.vectors[-1]


async def _nothing_until_the_end(answer: Answer) -> AsyncIterator[Any]:
    await answer.wait()
    nothing: tuple[Any, ...] = ()
    for output in nothing:
        yield output


class Processes(entrypoint.Engine):  # type: ignore[misc]
    """SGLang's processes, and the manager that talks with them."""

    run_scheduler_process_func = staticmethod(scheduler.run)

    @staticmethod
    def init_tokenizer_manager_func(server_args: Any, port_args: Any) -> tuple[Manager, Any]:
        """Make the manager, without templates: the frontend has them."""
        return Manager(server_args, port_args), None

    @classmethod
    def _launch_detokenizer_subprocesses(cls, **_: Any) -> tuple[list[Any], list[str]]:
        return [], []

    def shutdown(self) -> None:
        """Do nothing: the original, which also runs at interpreter exit, kills everything below this process."""

    def close(self) -> None:
        """Close what SGLang leaves open in this process: sockets, an event loop, and pipes to processes that ended."""
        for owner in (self, self.tokenizer_manager):
            for value in list(vars(owner).values()):
                if isinstance(value, zmq.Socket):
                    value.context.destroy(linger=0)
        self.loop.close()
        self._scheduler_init_result: Any = None  # its functions hold the schedulers' pipes
        multiprocessing.active_children()  # lets go of those that have ended
        atexit.unregister(self.shutdown)  # which would keep this object, its pipes and its loop


async def build(settings: ServerArgs) -> Processes:
    """Start SGLang's processes and wait until they are ready: for seconds or minutes.

    The thread that starts them never exits, because the kernel would kill them with it.

    :raises StartError: SGLang fails to start.
    """

    def start() -> Processes:
        try:
            return Processes(server_args=settings)
        finally:
            asyncio.set_event_loop(None)  # SGLang's, which this thread would keep

    try:
        return await in_thread(start, name="sglang", lasting=True)
    except Exception as error:
        raise start_error("SGLang", error) from error


def on_failed_process(fail: Callable[[], None]) -> None:
    """Handle SIGQUIT, which a failed process of SGLang sends and which would end the worker.

    It arrives about a second before that process exits, after it has logged the reason.
    """

    def failed() -> None:
        log.error("A process of SGLang reports that it has failed; see the engine's log output above")
        fail()

    asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, failed)


def _no_watchdog(**_: Any) -> SimpleNamespace:
    """Replace the thread that kills this process a second after one of SGLang's has died."""
    return SimpleNamespace(start=lambda: None, stop=lambda: None)


def _keep_logging(*_: Any) -> None:
    """Leave the worker's logging alone; SGLang's own processes configure theirs."""


entrypoint.SubprocessWatchdog = _no_watchdog
entrypoint.configure_logger = _keep_logging
