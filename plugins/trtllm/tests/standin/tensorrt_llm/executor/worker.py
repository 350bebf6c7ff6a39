"""The ranks' side: rank 0 takes requests from the proxy and leads, the others follow."""

from __future__ import annotations

import collections
import json
import os
import pickle
import queue
import threading
import time
import traceback
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from mpi4py import MPI
from tensorrt_llm import faults
from tensorrt_llm._torch.pyexecutor.hang_detector import HangDetector, hard_kill_on_rank_crash, propagate_hard_kill
from tensorrt_llm._torch.pyexecutor.llm_response import LlmResponse
from tensorrt_llm._torch.pyexecutor.py_executor import PyExecutor

from .ipc import ZeroMqQueue
from .request import CancellingRequest, GenerationRequest
from .rpc import RPCServer
from .utils import ErrorResponse, RequestError, WorkerCommIpcAddrs
from .worker_process_monitor import WorkerProcessIdentity, capture_worker_process_identity

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

READY_SIGNAL = b"READY"
IDENTITIES_SIGNAL = b"IDENTITIES"
#: How long rank 0 has to tell the proxy why it cannot load before every rank is ended.
REPORT_S = 1.0


class _Call:
    """A method that every rank has to call between two iterations."""

    def __init__(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.method, self.args, self.kwargs = method, args, kwargs
        self.results: Future[list[Any]] = Future()


class GenerationExecutorWorker:
    """Runs the engine's loop in a thread, as the real one does; the main thread of rank 0 reads requests."""

    def __init__(self, engine: PyExecutor, comm: MPI.Comm, max_stats_len: int, results: ZeroMqQueue | None) -> None:
        self._engine = engine
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._faults = comm.Dup()
        self._results = results
        self._inbox: queue.Queue[GenerationRequest | CancellingRequest | _Call | None] = queue.Queue()
        self._active: set[int] = set()
        self._deaf: set[int] = set()
        self._broken: str | None = None
        self._steps = 0
        self._news = threading.Condition()
        self._stats: collections.deque[str] = collections.deque(maxlen=max_stats_len)
        self._events: collections.deque[str] = collections.deque()
        self._silent = faults.enabled("SILENT_STATS")
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(self._lead if self._rank == 0 else self._follow,), name="executor_loop", daemon=True
        )

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def put(self, item: GenerationRequest | CancellingRequest | None) -> None:
        """Hand the loop of rank 0 a request, the wish to cancel one, or None to end."""
        self._inbox.put(item)

    def alive(self) -> bool:
        """Tell whether the loop runs."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the loop without bound; raise what it raised."""
        self._thread.join()
        if self._error is not None and not isinstance(self._error, faults.TaskEnds):
            raise self._error

    # What the proxy calls beside the queues.

    def fetch_stats(self, timeout: float) -> list[str]:
        """Return the statistics since the last call as JSON; wait up to `timeout` seconds for any."""
        return self._fetch(self._stats, timeout)

    def fetch_kv_cache_events(self, timeout: float) -> list[str]:
        """Return the KV events since the last call as JSON; wait up to `timeout` seconds for any."""
        return self._fetch(self._events, timeout)

    def kv_cache_capacity(self) -> dict[str, int]:
        """Return the size of the KV cache."""
        return self._engine.kv_cache_capacity()

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method of every rank's engine between two iterations; return one value per rank."""
        call = _Call(method, args, kwargs)
        self._inbox.put(call)
        return call.results.result()

    def _fetch(self, source: collections.deque[str], timeout: float) -> list[str]:
        with self._news:
            self._news.wait_for(lambda: source, timeout)
            found = list(source)
            source.clear()
        return [] if self._silent else found

    # The loop.

    def _run(self, loop: Any) -> None:
        try:
            loop()
        except BaseException as error:
            self._error = error
            if isinstance(error, faults.TaskEnds):
                return
            traceback.print_exc()
            if self._rank == 0:
                # It reaches the client, by its requests and by the future, so no rank has to be killed for it.
                self._send([LlmResponse(request_id=each, error=_portable(error), final=True) for each in self._active])
            else:
                hard_kill_on_rank_crash(self._size)

    def _send(self, responses: list[Any]) -> None:
        if responses and self._results is not None:
            self._results.put(responses)

    def _lead(self) -> None:
        faults.at("ready", self._rank)
        with HangDetector() as detector:
            while self._serve(self._take(detector)):
                detector.checkpoint()
                if not self._engine.idle():
                    responses = self._step()
                    self._active.difference_update(each.request_id for each in responses if each.final)
                    self._collect(self._stats, self._engine.latest_stats())
                    self._send(responses)
                self._collect(self._events, self._engine.latest_kv_events())
        self._engine.shutdown()

    def _follow(self) -> None:
        faults.at("ready", self._rank)
        while not self._engine.is_shutdown:
            self._step()
            if self._faults.Iprobe(source=0):
                faults.KINDS[self._faults.recv(source=0)]()
        self._engine.shutdown()

    def _step(self) -> list[LlmResponse]:
        self._steps += 1
        faults.at(f"step{self._steps}", self._rank)
        return self._engine.step()

    def _take(self, detector: HangDetector) -> list[Any]:
        """Return what waits; with nothing to do, wait for it."""
        items = []
        try:
            if self._engine.idle():
                with detector.pause():
                    items.append(self._inbox.get(timeout=1.0))
            while True:
                items.append(self._inbox.get_nowait())
        except queue.Empty:
            return items

    def _serve(self, items: list[Any]) -> bool:
        """Pass items on to the engine; return False after the last one."""
        for item in items:
            if item is None:
                if not faults.enabled("IGNORE_STOP"):
                    return False
            elif isinstance(item, _Call):
                self._call(item)
            elif isinstance(item, CancellingRequest):
                if item.id in self._active and item.id not in self._deaf and not faults.enabled("IGNORE_ABORT"):
                    self._engine.cancel(item.id)
            else:
                self._enqueue(item)
        return True

    def _call(self, call: _Call) -> None:
        try:
            call.results.set_result(self._engine.call(call.method, call.args, call.kwargs))
        except Exception as error:
            call.results.set_exception(error)

    def _enqueue(self, request: GenerationRequest) -> None:
        found = faults.triggered(request.prompt_token_ids)
        try:
            if found is not None:
                self._trigger(request, *found)
            if self._broken is not None:
                raise RequestError(self._broken)
            self._engine.enqueue(request)
        except (RequestError, ValueError) as error:
            self._send([ErrorResponse(request.id, str(error), request.id)])
        else:
            self._active.add(request.id)

    def _trigger(self, request: GenerationRequest, kind: str, rank: int) -> None:
        if kind in faults.KINDS:
            self._active.add(request.id)
            if rank == self._rank:
                faults.KINDS[kind]()
            else:
                # Seen after the next iteration, which this request will bring.
                self._faults.send(kind, dest=rank)
        elif kind == "request_error":
            raise RequestError("stand-in: this request fails")
        elif kind == "cuda_error":
            self._broken = faults.CUDA_TEXT
            for each in self._active:
                self._engine.cancel(each)
            self._send([LlmResponse(request_id=each, error=self._broken, final=True) for each in self._active])
            self._active.clear()
        elif kind == "request_exception":
            self._send([LlmResponse(request_id=request.id, error=RuntimeError("stand-in: fatal"), final=True)])
        elif kind == "ignore_abort":
            request.prompt_token_ids = request.prompt_token_ids[len(faults.TRIGGER) + 2 :]
            self._deaf.add(request.id)
        elif kind == "silent_stats":
            self._silent = True

    def _collect(self, target: collections.deque[str], items: list[dict[str, Any]]) -> None:
        if items:
            with self._news:
                target.extend(json.dumps(item) for item in items)
                self._news.notify_all()


def _portable(error: BaseException) -> BaseException:
    """Return the error, or its text in a RuntimeError if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def worker_main(args: TorchLlmArgs, addresses: WorkerCommIpcAddrs) -> None:
    """Be one rank, from its first report to the end of its engine."""
    os.environ.update(args.env_overrides or {})
    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    faults.at("start", rank)
    identities = comm.gather(capture_worker_process_identity(rank))
    if rank != 0:
        engine = _load(args, comm, None, [])
        worker = GenerationExecutorWorker(engine, comm, args.max_stats_len, None)
        comm.Barrier()
        worker.start()
        worker.join()
        return

    status = ZeroMqQueue(addresses.worker_init_status_queue_addr, is_server=False, name="worker_init_status_queue")
    # Before the model loads: a rank may die while it does.
    status.put((IDENTITIES_SIGNAL, None, identities))
    engine = _load(args, comm, status, identities)
    requests = ZeroMqQueue(addresses.request_queue_addr, is_server=False, name="worker_request_queue")
    results = ZeroMqQueue(addresses.result_queue_addr, is_server=False, name="worker_result_queue")
    worker = GenerationExecutorWorker(engine, comm, args.max_stats_len, results)
    server = RPCServer(
        *addresses.rpc_addr,
        {
            "fetch_stats": worker.fetch_stats,
            "fetch_kv_cache_events": worker.fetch_kv_cache_events,
            "kv_cache_capacity": worker.kv_cache_capacity,
            "call": worker.call,
        },
    )
    try:
        comm.Barrier()
        worker.start()
        status.put((READY_SIGNAL, None, identities))
        while worker.alive():
            if requests.poll(0.1):
                item = requests.get()
                worker.put(item)
                if item is None:
                    break
        worker.join()
    finally:
        server.shutdown()
        results.put(None)
        for each in (requests, results, status):
            each.close(linger_s=1)


def _load(
    args: TorchLlmArgs, comm: MPI.Comm, status: ZeroMqQueue | None, identities: list[WorkerProcessIdentity]
) -> PyExecutor:
    """Load the engine; a rank that cannot ends all of them, which would wait for it without end."""
    try:
        faults.at("load", comm.Get_rank())
        return PyExecutor(args, comm.Dup())
    except Exception as error:
        traceback.print_exc()
        if status is not None:
            status.put((_portable(error), traceback.format_exc(), identities))
        if comm.Get_size() > 1:
            time.sleep(REPORT_S)
            propagate_hard_kill()
        raise
