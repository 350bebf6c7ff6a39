"""Errors, and what both sides of the queues have to agree on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from .queues import has_event_loop

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.mpi_session import MpiCommSession, RemoteMpiCommSessionClient

__all__ = [
    "EngineDeadError",
    "ErrorResponse",
    "RequestError",
    "WorkerCommIpcAddrs",
    "create_mpi_comm_session",
    "get_spawn_proxy_process_env",
    "get_spawn_proxy_process_ipc_addr_env",
    "get_spawn_proxy_process_ipc_hmac_key_env",
    "has_event_loop",
]


class RequestError(RuntimeError):
    """One request failed; the engine lives."""


class EngineDeadError(RuntimeError):
    """The engine is dead, and with it every request; `root_cause` says why."""

    def __init__(self, root_cause: BaseException | None = None) -> None:
        self.root_cause = root_cause
        super().__init__("Engine has died" if root_cause is None else f"Engine has died: {root_cause}")

    def __reduce__(self) -> tuple[type[EngineDeadError], tuple[BaseException | None]]:
        return type(self), (self.root_cause,)


class ErrorResponse(NamedTuple):
    """What rank 0 sends for a request that it could not even enqueue."""

    client_id: int
    error_msg: str | Exception
    request_id: int


class WorkerCommIpcAddrs(NamedTuple):
    """Address and key of every queue, and of the calls beside them."""

    request_queue_addr: tuple[str, bytes]
    worker_init_status_queue_addr: tuple[str, bytes]
    result_queue_addr: tuple[str, bytes]
    rpc_addr: tuple[str, bytes]


def get_spawn_proxy_process_env() -> bool:
    """Tell whether `trtllm-llmapi-launch` started this process."""
    return os.environ.get("TLLM_SPAWN_PROXY_PROCESS") == "1"


def get_spawn_proxy_process_ipc_addr_env() -> str | None:
    """Return the address of the leader's server, if `trtllm-llmapi-launch` started this process."""
    return os.environ.get("TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR")


_hmac_key: bytes | None = None


def get_spawn_proxy_process_ipc_hmac_key_env() -> bytes:
    """Return the key of the leader's server; the first call removes it from the environment.

    Raises RuntimeError without one.
    """
    global _hmac_key
    if _hmac_key is None:
        text = os.environ.pop("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY", None)
        if text is None:
            raise RuntimeError("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY is not set; start with trtllm-llmapi-launch")
        _hmac_key = bytes.fromhex(text)
    return _hmac_key


def create_mpi_comm_session(n_workers: int) -> MpiCommSession | RemoteMpiCommSessionClient:
    """Use the ranks that `trtllm-llmapi-launch` or mpirun started."""
    from tensorrt_llm.llmapi.mpi_session import MpiCommSession, RemoteMpiCommSessionClient

    if not get_spawn_proxy_process_env():
        return MpiCommSession(n_workers=n_workers)
    address = get_spawn_proxy_process_ipc_addr_env()
    if address is None:
        raise RuntimeError("TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR is not set; start with trtllm-llmapi-launch")
    return RemoteMpiCommSessionClient(address, get_spawn_proxy_process_ipc_hmac_key_env())
