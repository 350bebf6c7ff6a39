"""The thread in which the engine runs: whatever blocks there, the worker's event loop does not wait for it."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any

from dynamo_worker.kit.blocking import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker import Deadline
    from dynamo_worker_acme.toy import Toy

#: The tokens of one answer, the last one with its finish reason; None once the engine is dead.
Answer = asyncio.Queue["tuple[int, str | None] | None"]


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
        self._commands: queue.SimpleQueue[Callable[[Toy], None] | None] = queue.SimpleQueue()
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
            answer.put_nowait(None)
            return answer
        self._answers.add(answer)
        self._commands.put(lambda engine: engine.add(answer, prompt, parameters))
        return answer

    def abort(self, answer: Answer) -> None:
        """Tell the engine to forget a request; it may be finished."""
        self._answers.discard(answer)
        self._commands.put(lambda engine: engine.abort(answer))

    async def stop(self, deadline: Deadline) -> None:
        """End the thread after its current step; one that does not end by the deadline is left to the supervisor."""
        self._fail("the engine is shut down")
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

    def _fail(self, reason: str) -> None:
        self.error = self.error or reason
        for answer in self._answers:
            answer.put_nowait(None)
        self._answers.clear()

    # --- In the thread

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._tell(self._set_loaded, error)
            return
        self._tell(self._set_loaded, None)
        try:
            while self._obey(engine):
                self._tell(self._deliver, engine.step())
        except BaseException as error:
            self._tell(self._fail, f"the acme engine failed: {error!r}")
        finally:
            engine.close()

    def _obey(self, engine: Toy) -> bool:
        """Do what was asked for; wait if there is nothing else to do. Return whether to go on."""
        while True:
            try:
                command = self._commands.get(block=not engine.busy())
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
