"""What every executor does, wherever its engine runs."""

from __future__ import annotations

import atexit
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from .utils import RequestError

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
    from tensorrt_llm.llmapi.mpi_session import MpiSession

    from .proxy import GenerationExecutorProxy
    from .request import GenerationRequest
    from .result import GenerationResult


async def empty_async_iterable() -> AsyncIterator[dict[str, Any]]:
    """Yield nothing."""
    return
    yield


class GenerationExecutor(ABC):
    """Takes requests; remembers the first fatal error."""

    def __init__(self) -> None:
        self._error_queue: Queue[BaseException | str] = Queue()
        self.doing_shutdown = False
        self._fatal_error: BaseException | None = None
        self._last_client_id = 1
        atexit.register(self.shutdown)

    @staticmethod
    def create(
        args: TorchLlmArgs, model_world_size: int = 1, mpi_session: MpiSession | None = None
    ) -> GenerationExecutorProxy:
        """Start the ranks, or use those of a session, and block until the engine is ready."""
        from .proxy import GenerationExecutorProxy

        return GenerationExecutorProxy(args, model_world_size=model_world_size, mpi_session=mpi_session)

    @abstractmethod
    def submit(self, request: GenerationRequest) -> GenerationResult:
        """Number a request and send it to the engine."""

    @abstractmethod
    def abort_request(self, request_id: int) -> None:
        """Send the engine the wish to cancel."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the engine."""

    def pre_shutdown(self) -> None:
        """Begin to end: no more requests."""
        self.doing_shutdown = True

    def is_shutdown(self) -> bool:
        """Tell whether the executor ends, or has to."""
        return self.doing_shutdown or self._fatal_error is not None

    def _set_fatal_error(self, error: BaseException) -> None:
        if self._fatal_error is None:
            self._fatal_error = error

    def _drain_error_queue(self) -> bool:
        """Take what threads reported; record the first fatal error and tell whether there was one."""
        while True:
            try:
                error = self._error_queue.get_nowait()
            except Empty:
                return False
            if isinstance(error, str):
                continue  # of one request
            self._set_fatal_error(error)
            return True

    def check_health(self) -> bool:
        """Look for fatal errors; the first one found begins the shutdown."""
        if self.is_shutdown():
            return False
        if self._drain_error_queue():
            self.pre_shutdown()
            return False
        return True

    def _handle_background_error(self, error: BaseException | str | None = None) -> None:
        """Raise an error, or the next one that a thread reported; all but those of one request first shut down."""
        if isinstance(error, str):
            raise RequestError(error)
        if isinstance(error, RequestError):
            raise error
        if error is None:
            try:
                error = self._error_queue.get_nowait()
            except Empty:
                return
            if isinstance(error, str):
                raise RequestError(error)
        self._set_fatal_error(error)
        self.shutdown()
        raise error

    def _get_next_client_id(self) -> int:
        self._last_client_id = (self._last_client_id + 1) & ((1 << 64) - 1)
        return self._last_client_id
