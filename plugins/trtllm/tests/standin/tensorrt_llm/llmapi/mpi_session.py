"""The rank processes: spawned by this process, given by mpirun, or behind the leader of `trtllm-llmapi-launch`."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import zmq
from mpi4py import MPI
from mpi4py.futures import MPICommExecutor, MPIPoolExecutor
from tensorrt_llm.executor.ipc import ZeroMqQueue

#: What every spawned rank gets of the environment; the rest is what MPI saw when it began.
FORWARDED = ("TRTLLM", "TLLM", "FLASHINFER_WORKSPACE_BASE", "FLASHINFER_CUBIN_DIR")


class MpiSession(abc.ABC):
    """Runs one task in every rank."""

    n_workers: int

    @abc.abstractmethod
    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        """Start a task in every rank."""

    @abc.abstractmethod
    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run a task in every rank and return what they returned."""

    @abc.abstractmethod
    def shutdown(self, wait: bool = True) -> None:
        """End the ranks; wait for them without bound."""

    @abc.abstractmethod
    def abort(self) -> None:
        """End the ranks by MPI_Abort, and with them this process."""

    def is_comm_session(self) -> bool:
        """Tell whether the ranks were started from outside."""
        return isinstance(self, (MpiCommSession, RemoteMpiCommSessionClient))

    def shutdown_abort(self, grace: float = 60, reason: object = None) -> None:
        """End the ranks; after `grace` seconds call MPI_Abort, which ends this process too."""
        if sys.is_finalizing():
            self.shutdown(wait=False)
            return
        done: Future[None] = Future()

        def kill() -> None:
            try:
                done.result(timeout=grace)
            except concurrent.futures.TimeoutError:
                print(f"MpiSession: ranks still there after {grace} s, MPI_Abort: {reason!r}", file=sys.stderr)
                self.abort()

        killer = threading.Thread(target=kill, name="MpiSessionTimeoutKiller")
        killer.start()
        self.shutdown()
        done.set_result(None)
        killer.join()

    def release_exit_joins(self) -> None:  # noqa: B027 - nothing to do is fine
        """Let nothing wait for these ranks any more; for one who found them dead, owner or not."""

    def abandon(self) -> None:
        """Give the ranks up without waiting for them."""
        self.release_exit_joins()
        self.shutdown(wait=False)


def _abandon_mpi_pool_threads(mpi_pool: MPIPoolExecutor) -> None:
    """Take the pool's manager thread out of what mpi4py and CPython (3.9 to 3.12) join at exit."""
    thread = getattr(getattr(mpi_pool, "_pool", None), "thread", None)
    if thread is None:
        return
    for module in ("mpi4py.futures._lib", "mpi4py.futures._core"):
        registry = getattr(sys.modules.get(module), "THREADS_QUEUES", None)
        if registry is not None:
            with contextlib.suppress(KeyError):
                registry.pop(thread)
    locks = getattr(threading, "_shutdown_locks", None)
    lock = getattr(thread, "_tstate_lock", None)
    if locks is not None and lock is not None:
        locks.discard(lock)


class MpiPoolSession(MpiSession):
    """Spawns the ranks as `mpi4py.futures` servers: children of `orted`, each a process group of its own."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self.comm = MPI.COMM_WORLD
        self._dead = False
        environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        self.mpi_pool: MPIPoolExecutor | None = MPIPoolExecutor(max_workers=n_workers, path=sys.path, env=environment)

    def get_comm(self) -> MPI.Comm:
        return self.comm

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        assert self.mpi_pool is not None, "MPI session not started"
        return [self.mpi_pool.submit(task, *args, **kwargs) for _ in range(self.n_workers)]

    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [future.result() for future in self.submit(task, *args, **kwargs)]

    def shutdown(self, wait: bool = True) -> None:
        pool, self.mpi_pool = self.mpi_pool, None
        if pool is not None:
            pool.shutdown(wait=wait and not self._dead)

    def abort(self) -> None:
        self.comm.Abort(1)

    def release_exit_joins(self) -> None:
        self._dead = True
        if self.mpi_pool is not None:
            _abandon_mpi_pool_threads(self.mpi_pool)

    def __del__(self) -> None:
        self.shutdown_abort()

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle MPI session")


class MpiCommSession(MpiSession):
    """Uses the ranks of mpirun: this process is rank 0 and runs its share in a thread."""

    _executor: MPICommExecutor | None = None
    _pool: MPIPoolExecutor | None = None

    def __init__(self, comm: MPI.Comm | None = None, n_workers: int = 1) -> None:
        self.comm = comm or MPI.COMM_WORLD
        self.n_workers = n_workers
        if self.comm.Get_rank() != 0:
            raise RuntimeError(f"only rank 0 can start multi-node session, got {self.comm.Get_rank()}")
        if self.comm.Get_size() != n_workers:
            raise ValueError(
                f"n_workers must be equal to the number of processes in MPI, got {n_workers} vs {self.comm.Get_size()}"
            )
        self.thread_pool: ThreadPoolExecutor | None = ThreadPoolExecutor(max_workers=2)
        # An MPI process can have one of these, ever.
        if MpiCommSession._executor is None:
            MpiCommSession._executor = MPICommExecutor(self.comm)
            MpiCommSession._pool = MpiCommSession._executor.__enter__()
        self.mpi_pool = MpiCommSession._pool

    @classmethod
    def close_world(cls) -> None:
        """Let the other ranks leave `mgmn_worker_node`."""
        if cls._executor is not None:
            cls._executor.__exit__(None, None, None)
            cls._executor = cls._pool = None

    def get_comm(self) -> MPI.Comm:
        return self.comm

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        assert self.thread_pool is not None, "MPI session not started"
        others = (
            [self.mpi_pool.submit(task, *args, **kwargs) for _ in range(self.n_workers - 1)] if self.mpi_pool else []
        )
        return [self.thread_pool.submit(task, *args, **kwargs), *others]

    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [future.result() for future in self.submit(task, *args, **kwargs)]

    def shutdown(self, wait: bool = True) -> None:
        self.mpi_pool = None
        if self.thread_pool is not None:
            self.thread_pool.shutdown(wait=wait)
            self.thread_pool = None

    def abort(self) -> None:
        self.comm.Abort(1)

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle MPI session")


class RemoteTask(NamedTuple):
    """A task on its way to the leader; with `sync` the results come back."""

    task: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sync: bool = False


class RemoteWorkerDeath(NamedTuple):
    """Says that a rank's task failed; no future crosses the socket."""

    exc_type: str
    message: str

    @classmethod
    def from_exception(cls, error: BaseException) -> RemoteWorkerDeath:
        return cls(type(error).__name__, str(error))

    def to_exception(self) -> RuntimeError:
        return RuntimeError(f"Remote MPI worker died: {self.exc_type}: {self.message}")


class RemoteMpiCommSessionClient(MpiSession):
    """Reaches the ranks through their leader: one per process, since a PAIR socket has one peer; never closed."""

    _global_instance: RemoteMpiCommSessionClient | None = None
    _lock = threading.Lock()

    def __new__(cls, addr: str, hmac_key: bytes) -> RemoteMpiCommSessionClient:  # noqa: PYI034 - Self needs Python 3.11
        with cls._lock:
            if cls._global_instance is None or cls._global_instance.addr != addr:
                instance = super().__new__(cls)
                instance.addr = addr
                instance.queue = ZeroMqQueue((addr, hmac_key), is_server=False, socket_type=zmq.PAIR)
                instance._pending_responses = []
                cls._global_instance = instance
            return cls._global_instance

    def __init__(self, addr: str, hmac_key: bytes) -> None:
        self.addr = addr

    def submit(self, task: Callable[..., Any], *args: Any, sync: bool = False, **kwargs: Any) -> list[Future[Any]]:
        """Send a task; there are no futures."""
        self.queue.put(RemoteTask(task, args, kwargs, sync))
        return []

    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        self.submit(task, *args, sync=True, **kwargs)
        while True:
            response = self.poll()
            if response:
                return response

    def poll(self) -> Any:
        """Return a response, or False if none came within 0.1 s."""
        if self._pending_responses:
            return self._pending_responses.pop(0)
        return self.queue.get() if self.queue.poll(0.1) else False

    def check_worker_error(self) -> RuntimeError | None:
        """Return the death that the leader reported, if any, without waiting."""
        while self.queue.poll(0):
            message = self.queue.get()
            if isinstance(message, RemoteWorkerDeath):
                return message.to_exception()
            self._pending_responses.append(message)
        return None

    def abort(self) -> None:
        self.shutdown()

    def shutdown(self, wait: bool = True) -> None:
        """Do nothing: the next LLM of this process needs the connection."""

    def shutdown_abort(self, grace: float = 60, reason: object = None) -> None:
        self.shutdown()


def _run_together(task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a task between two barriers of all ranks."""
    MPI.COMM_WORLD.barrier()
    try:
        return task(*args, **kwargs)
    finally:
        MPI.COMM_WORLD.barrier()


class RemoteMpiCommSessionServer:
    """Serves the ranks of mpirun to one client, task after task, until it is sent None."""

    def __init__(self, hmac_key: bytes, addr: str, n_workers: int) -> None:
        self.queue = ZeroMqQueue((addr, hmac_key), is_server=True, socket_type=zmq.PAIR)
        self.session = MpiCommSession(n_workers=n_workers)
        self._running: list[Future[Any]] = []

    def serve(self) -> None:
        """Take tasks until None."""
        for number in itertools.count():
            concurrent.futures.wait(self._running)
            message = self.queue.get()
            if message is None:
                break
            self._running = self.session.submit(_run_together, message.task, *message.args, **message.kwargs)
            if message.sync:
                self.queue.put([future.result() for future in self._running])
            else:
                for future in self._running:
                    future.add_done_callback(self._report_failure)
            print(f"task {number}: {message.task.__name__} runs on {len(self._running)} ranks", flush=True)
        self.session.shutdown()
        MpiCommSession.close_world()
        self.queue.close(linger_s=1)

    def _report_failure(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self.queue.put(RemoteWorkerDeath.from_exception(future.exception()))
