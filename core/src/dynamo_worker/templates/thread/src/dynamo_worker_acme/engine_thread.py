"""The thread in which the engine runs: whatever blocks there, the worker's event loop does not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

from dynamo_worker import EngineDeadError
from dynamo_worker.kit.blocking import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker import Deadline
    from dynamo_worker_acme.toy import Toy

#: The tokens of one answer, the last one with its finish reason; or why there are no more.
Answer = asyncio.Queue["tuple[int, str | None] | BaseException"]


class EngineThread:
    """An engine in a thread of its own. Create it on the event loop.

    Requests and aborts go in through a queue; each answer comes out of a queue on the event loop.

    :ivar steps: number of steps the engine has taken.
    :ivar error: why the engine is dead; None while it lives.
    """

    def __init__(self, load: Callable[[], Toy]) -> None:
        self.steps = 0
        self.error: str | None = None
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        #: An answer to be begun, with its prompt and parameters; one to be aborted; or None for the end.
        self._commands: queue.SimpleQueue[tuple[Answer, list[int] | None, Mapping[str, Any]] | None] = (
            queue.SimpleQueue()
        )
        self._answers: set[Answer] = set()
        self._thread = threading.Thread(target=self._run, name="acme-engine", daemon=True)

    # --- On the event loop

    async def start(self) -> None:
        """Start the thread, and wait until the engine is loaded.

        :raises Exception: it cannot be loaded.
        """
        self._thread.start()
        await self._loaded

    def add(self, prompt: list[int], parameters: Mapping[str, Any]) -> Answer:
        """Give the engine a request, and return its answer."""
        answer: Answer = asyncio.Queue()
        if self.error is not None:
            answer.put_nowait(EngineDeadError(self.error))
            return answer
        self._answers.add(answer)
        self._commands.put((answer, prompt, parameters))
        return answer

    def abort(self, answer: Answer) -> None:
        """Tell the engine to forget a request; it may be finished."""
        if answer in self._answers:
            self._end(answer, asyncio.CancelledError())
            self._commands.put((answer, None, {}))

    async def stop(self, deadline: Deadline) -> None:
        """End the thread after its current step; one that does not end by the deadline is left to the supervisor."""
        self._die("the acme engine is shut down")
        self._commands.put(None)
        if self._thread.is_alive():
            await in_thread(self._thread.join, deadline.reserve(0.2).remaining(), name="acme-join")

    def _set_loaded(self, error: BaseException | None) -> None:
        if self._loaded.done():  # the start was cancelled
            return
        if error is None:
            self._loaded.set_result(None)
        else:
            self._loaded.set_exception(error)

    def _deliver(self, outputs: dict[Answer, tuple[int, str | None]]) -> None:
        self.steps += 1
        for answer, output in outputs.items():
            answer.put_nowait(output)
            if output[1] is not None:
                self._answers.discard(answer)

    def _end(self, answer: Answer, error: BaseException) -> None:
        answer.put_nowait(error)
        self._answers.discard(answer)

    def _die(self, reason: str) -> None:
        self.error = self.error or reason
        for answer in list(self._answers):
            self._end(answer, EngineDeadError(self.error))

    # --- In the thread

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._tell(self._set_loaded, error)
            return
        self._tell(self._set_loaded, None)
        working: set[Answer] = set()
        try:
            while self._obey(engine, working):
                outputs = engine.step()
                self._tell(self._deliver, outputs)
                working -= {answer for answer, (_, reason) in outputs.items() if reason is not None}
        except BaseException as error:
            self._tell(self._die, f"the acme engine failed: {error!r}")
        finally:
            engine.close()

    def _obey(self, engine: Toy, working: set[Answer]) -> bool:
        """Do what was asked for; wait if there is nothing else to do. Return whether to go on."""
        while True:
            try:
                command = self._commands.get(block=not working)
            except queue.Empty:
                return True
            if command is None:
                return False
            answer, prompt, parameters = command
            if prompt is None:
                working.discard(answer)
                engine.abort(answer)
                continue
            try:
                engine.add(answer, prompt, parameters)
                working.add(answer)
            except Exception as error:  # this request fails, the others go on
                self._tell(self._end, answer, error)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)
