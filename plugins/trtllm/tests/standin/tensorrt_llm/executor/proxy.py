"""The main process's side: starts the ranks, sends them requests, hands out what returns, notices deaths."""

from __future__ import annotations

import atexit
import concurrent.futures
import json
import os
import secrets
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from tensorrt_llm import faults
from tensorrt_llm.llmapi.mpi_session import MpiPoolSession, MpiSession, RemoteMpiCommSessionClient

from .executor import GenerationExecutor, empty_async_iterable
from .ipc import ZeroMqQueue
from .queues import AsyncQueue, ManagedThread, _SyncQueue
from .request import CancellingRequest, GenerationRequest
from .result import GenerationResult, IterationResult
from .rpc import RPCClient, get_unique_ipc_addr
from .utils import (
    EngineDeadError,
    ErrorResponse,
    WorkerCommIpcAddrs,
    create_mpi_comm_session,
    get_spawn_proxy_process_env,
)
from .worker import IDENTITIES_SIGNAL, READY_SIGNAL, worker_main
from .worker_process_monitor import WorkerProcessIdentity, WorkerProcessMonitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

#: What a dead engine gets at shutdown, twice: for its futures, and for the thread that reads results.
DEAD_S = 5.0
#: How much longer than its wait a call into rank 0 may take.
RPC_MARGIN_S = 0.5


class GenerationExecutorProxy(GenerationExecutor):
    """Blocks until the engine is ready; raises RuntimeError if it does not get there."""

    READY_SIGNAL = READY_SIGNAL

    def __init__(self, args: TorchLlmArgs, model_world_size: int = 1, mpi_session: MpiSession | None = None) -> None:
        self.workers_started = False
        super().__init__()
        self._engine_dead = False
        self._results: dict[int, GenerationResult] = {}
        self.mpi_futures: list[concurrent.futures.Future[None]] = []
        self.dispatch_result_thread: ManagedThread | None = None
        self._iter_stats_result: IterationResult | None = None
        self._iter_kv_events_result: IterationResult | None = None
        self._worker_process_monitor = WorkerProcessMonitor()
        self._monitor_wakeup = threading.Event()
        self.model_world_size = model_world_size
        self._owns_mpi_session = mpi_session is None
        if mpi_session is None:
            in_launcher = get_spawn_proxy_process_env()
            mpi_session = (create_mpi_comm_session if in_launcher else MpiPoolSession)(model_world_size)
        elif getattr(mpi_session, "n_workers", model_world_size) != model_world_size:
            raise ValueError(
                f"External MPI session has {mpi_session.n_workers} workers but "
                f"the model needs world_size={model_world_size}."
            )
        self.mpi_session = mpi_session
        self.request_queue = ZeroMqQueue(is_server=True, name="proxy_request_queue")
        self.worker_init_status_queue = ZeroMqQueue(is_server=True, name="worker_init_status_queue")
        self.result_queue = ZeroMqQueue(is_server=True, name="proxy_result_queue")
        rpc_address = (get_unique_ipc_addr(), secrets.token_bytes(32))
        addresses = WorkerCommIpcAddrs(
            self.request_queue.address,
            self.worker_init_status_queue.address,
            self.result_queue.address,
            rpc_address,
        )
        self._start_executor_workers(args, addresses)
        self.rpc_client = RPCClient(*rpc_address)
        self._start_error_monitor()
        hold = faults.seconds("FORK_HOLDER_SECONDS", 0)
        if hold and os.fork() == 0:
            time.sleep(hold)
            os._exit(0)
        try:
            # Before mpi4py's own exit hook, which waits for the ranks.
            threading._register_atexit(self.pre_shutdown)
        except AttributeError:
            atexit.register(self.pre_shutdown)

    # Start.

    def _start_executor_workers(self, args: TorchLlmArgs, addresses: WorkerCommIpcAddrs) -> None:
        reference = weakref.ref(self)

        def done(future: concurrent.futures.Future[None]) -> None:
            proxy = reference()
            if proxy is not None and not future.cancelled() and future.exception() is not None:
                proxy._handle_worker_death(future.exception())

        self.mpi_futures = self.mpi_session.submit(worker_main, args, addresses)
        for future in self.mpi_futures:
            future.add_done_callback(done)
        error: BaseException | None = None
        dead = False
        while True:
            if self.worker_init_status_queue.poll(0.2):
                signal, _, identities = self.worker_init_status_queue.get()
                if signal == READY_SIGNAL:
                    break
                if signal == IDENTITIES_SIGNAL:
                    self._register_worker_processes(identities)
                    continue
                error = RuntimeError("Executor worker returned error")
                error.__cause__ = signal
                break
            if self._find_death() is not None:
                error = RuntimeError("Executor worker died during initialization")
                error.__cause__ = self._find_death()
                dead = not all(future.done() for future in self.mpi_futures)
                break
        if error is None:
            self.workers_started = True
            return
        if not dead and self.model_world_size > 1:
            # The ranks end each other now; their futures would wait for ever.
            until = time.monotonic() + DEAD_S
            while self._worker_process_monitor.find_dead_worker() is None and time.monotonic() < until:
                time.sleep(0.05)
            dead = self._worker_process_monitor.find_dead_worker() is not None
        self._worker_process_monitor.close()
        if dead:
            self.mpi_session.release_exit_joins()
        if self._owns_mpi_session:
            if dead:
                self.mpi_session.abandon()
            else:
                self.mpi_session.shutdown_abort(reason=error)
        raise error

    def _register_worker_processes(self, identities: list[WorkerProcessIdentity]) -> None:
        if faults.enabled("MONITOR", default=True) and not isinstance(self.mpi_session, RemoteMpiCommSessionClient):
            self._worker_process_monitor.register(identities)

    # Death.

    def _find_death(self) -> BaseException | None:
        """Return why the ranks are dead, None if they seem to live."""
        for future in self.mpi_futures:
            if future.done():
                error = None if future.cancelled() else future.exception()
                return error or RuntimeError("MPI worker exited unexpectedly")
        found = self._worker_process_monitor.find_dead_worker()
        if found is not None:
            return RuntimeError(f"rank {found.rank} (pid {found.pid}) exited unexpectedly")
        check = getattr(self.mpi_session, "check_worker_error", None)
        return check() if check is not None else None

    def _handle_worker_death(self, error: BaseException) -> None:
        self._mark_engine_dead(error)
        self._error_queue.put_nowait(error)

    def _mark_engine_dead(self, error: BaseException) -> None:
        """Fail every pending request, once."""
        if self._engine_dead:
            return
        self._engine_dead = True
        for result in list(self._results.values()):
            try:
                result.queue.put(EngineDeadError(error))
            except AsyncQueue.EventLoopShutdownError:
                continue  # nobody waits any more

    def _check_workers(self) -> bool:
        """Look for a death; record it, fail every request and begin the shutdown. Tell whether all live."""
        error = self._find_death()
        if error is None:
            return True
        self._set_fatal_error(error)
        self._mark_engine_dead(error)
        if faults.enabled("BOUNDED_DEAD_SHUTDOWN", default=True):
            self.mpi_session.release_exit_joins()
        self.pre_shutdown()
        return False

    def check_health(self) -> bool:
        return super().check_health() and self._check_workers()

    def _start_error_monitor(self) -> None:
        period = faults.seconds("MONITOR_SECONDS", 0.5)
        reference = weakref.ref(self)
        wakeup = self._monitor_wakeup

        def watch() -> None:
            while not wakeup.wait(period):
                proxy = reference()
                if proxy is None or proxy.is_shutdown() or not proxy.check_health():
                    return
                del proxy

        threading.Thread(target=watch, name="proxy_error_monitor", daemon=True).start()

    # Requests.

    def submit(self, request: GenerationRequest) -> GenerationResult:
        if self._engine_dead or self._fatal_error is not None:
            raise EngineDeadError(self._fatal_error)
        self._start_dispatch_threads()
        request.set_id(self._get_next_client_id())
        result = GenerationResult(
            request,
            background_error_handler=self._handle_background_error,
            executor=self,
            disaggregated_params=request.disaggregated_params,
        )
        self._results[request.id] = result
        if self._engine_dead:
            # It died since the first look, and its requests were failed without this one.
            self._results.pop(request.id, None)
            raise EngineDeadError(self._fatal_error)
        self.request_queue.put(request)
        self._handle_background_error()
        return result

    def abort_request(self, request_id: int) -> None:
        self.request_queue.put(CancellingRequest(request_id))

    def _abort_all_requests(self) -> None:
        for result in list(self._results.values()):
            result.abort()

    def _start_dispatch_threads(self) -> None:
        if self.dispatch_result_thread is None:
            self.dispatch_result_thread = ManagedThread(
                weakref.WeakMethod(self.dispatch_result_task), self._error_queue, "proxy_dispatch_result_thread"
            )
            self.dispatch_result_thread.start()
        self._handle_background_error()

    def dispatch_result_task(self) -> bool:
        """Hand out the responses of one message; return False after the last one."""
        responses = self.result_queue.get()
        if responses is None:
            return False
        loop, waiting = None, []
        for response in responses:
            error = isinstance(response, ErrorResponse)
            request_id = response.client_id if error else response.request_id
            result = self._results.get(request_id)
            if result is None:
                continue
            if isinstance(result.queue, _SyncQueue):
                result.queue.put_nowait(response)
                waiting.append(result.queue)
                loop = loop or result.queue.loop  # one loop per executor
            else:
                result.queue.put(response)
            if error or response.final:
                self._results.pop(request_id, None)
        if waiting:
            _SyncQueue.notify_many(loop, waiting)
        return True

    # Statistics, KV events, calls.

    def _fetch(self, method: str, timeout: float) -> list[str]:
        """Block up to `timeout` seconds and a margin; a failed call looks like no news."""
        try:
            return self.rpc_client.call(method, timeout, timeout=timeout + RPC_MARGIN_S)
        except Exception:
            return []

    def _no_stats_yet(self) -> bool:
        return faults.enabled("OLD_STATS") and self.dispatch_result_thread is None

    def _iterate(self, result: IterationResult, items: list[str], timeout: float) -> IterationResult:
        result.mark_undone()
        for item in items:
            try:
                result.queue.put(item)
            except AsyncQueue.EventLoopShutdownError:
                break
        result.set_timeout(timeout)
        return result

    def get_stats(self, timeout: float) -> list[dict[str, Any]]:
        """Return the statistics of the iterations since the last call."""
        return [] if self._no_stats_yet() else [json.loads(each) for each in self._fetch("fetch_stats", timeout)]

    def aget_stats(self, timeout: float) -> AsyncIterable[dict[str, Any]]:
        """Return the same to iterate over; blocks like `get_stats`."""
        if self._no_stats_yet():
            return empty_async_iterable()
        self._iter_stats_result = self._iter_stats_result or IterationResult()
        return self._iterate(self._iter_stats_result, self._fetch("fetch_stats", timeout), timeout)

    def get_kv_events(self, timeout: float) -> list[dict[str, Any]]:
        """Return the KV events since the last call."""
        if self._no_stats_yet():
            return []
        return [json.loads(each) for each in self._fetch("fetch_kv_cache_events", timeout)]

    def aget_kv_events(self, timeout: float) -> AsyncIterable[dict[str, Any]]:
        """Return the same to iterate over; blocks like `get_kv_events`."""
        if self._no_stats_yet():
            return empty_async_iterable()
        self._iter_kv_events_result = self._iter_kv_events_result or IterationResult()
        return self._iterate(self._iter_kv_events_result, self._fetch("fetch_kv_cache_events", timeout), timeout)

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """Return the size of the KV cache."""
        return self.rpc_client.call("kv_cache_capacity", timeout=10)

    def collective_rpc(
        self,
        method: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        target_ranks: int | list[int] | None = None,
    ) -> Any:
        """Call a method of every rank's engine; return one value per rank, or a future of that with `non_block`."""
        if target_ranks is not None:
            raise NotImplementedError("the stand-in calls every rank")

        def call() -> list[Any]:
            results = self.rpc_client.call("call", method, args, kwargs or {}, timeout=None)
            return results if unique_reply_rank is None else [results[unique_reply_rank]]

        if not non_block:
            return call()
        future: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, name="collective_rpc", daemon=True).start()
        return future

    # End.

    def pre_shutdown(self) -> None:
        """Cancel every request and tell the ranks to end, once."""
        if not self.workers_started or self.doing_shutdown:
            return
        self.doing_shutdown = True
        self._monitor_wakeup.set()
        if not self._engine_dead:
            self._abort_all_requests()
        if not self.mpi_futures or any(not future.done() for future in self.mpi_futures):
            self.request_queue.put_noblock(None, retry=4)

    def shutdown(self) -> None:
        """Wait for the end of the ranks: without bound if they live, about 10 s if they are dead."""
        if not self.workers_started:
            return
        self.pre_shutdown()
        dead = self._engine_dead and faults.enabled("BOUNDED_DEAD_SHUTDOWN", default=True)
        concurrent.futures.wait(self.mpi_futures, timeout=DEAD_S if dead else None)
        thread = self.dispatch_result_thread
        if thread is not None and thread.is_alive():
            thread.stop()
            thread.join(timeout=DEAD_S if dead else None)
        self.workers_started = False
        self.rpc_client.close()
        self._worker_process_monitor.close()
        self.request_queue.close()
        self.worker_init_status_queue.close()
        if thread is None or not thread.is_alive():
            self.result_queue.close()
        if self._owns_mpi_session:
            if dead:
                self.mpi_session.abandon()
            else:
                self.mpi_session.shutdown()
        self._handle_background_error()

    def __del__(self) -> None:
        self.shutdown()
