"""Rank 0 under `trtllm-llmapi-launch`: serves all ranks to the process that has the LLM; `--action stop` ends it."""

from __future__ import annotations

import argparse

from tensorrt_llm.executor.ipc import ZeroMqQueue
from tensorrt_llm.executor.utils import (
    get_spawn_proxy_process_ipc_addr_env,
    get_spawn_proxy_process_ipc_hmac_key_env,
)


def start() -> None:
    """Serve until told to stop."""
    from mpi4py import MPI
    from tensorrt_llm.llmapi.mpi_session import RemoteMpiCommSessionServer

    address = get_spawn_proxy_process_ipc_addr_env()
    assert address is not None
    key = get_spawn_proxy_process_ipc_hmac_key_env()
    RemoteMpiCommSessionServer(hmac_key=key, addr=address, n_workers=MPI.COMM_WORLD.Get_size()).serve()


def stop() -> None:
    """Tell the server to stop; it is deaf while a task runs."""
    address = get_spawn_proxy_process_ipc_addr_env()
    assert address is not None
    queue = ZeroMqQueue((address, get_spawn_proxy_process_ipc_hmac_key_env()), is_server=False)
    queue.put(None)
    queue.close(linger_s=60)


def main() -> None:
    """Do what `--action` says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--action", choices=["start", "stop"], default="start")
    {"start": start, "stop": stop}[parser.parse_args().action]()


if __name__ == "__main__":
    main()
