"""The other ranks under `trtllm-llmapi-launch`: run what rank 0 sends until it leaves."""

from __future__ import annotations

import tensorrt_llm  # noqa: F401 - the real one loads before the first task, too
from mpi4py.futures import MPICommExecutor
from mpi4py.MPI import COMM_WORLD


def main() -> None:
    """Serve rank 0."""
    with MPICommExecutor(COMM_WORLD) as executor:
        if executor is not None:
            raise RuntimeError(f"rank{COMM_WORLD.rank} should not have executor")


if __name__ == "__main__":
    main()
