"""What a trainer adds to vLLM's workers (``--worker-extension-cls``): weights over a group of CPU processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore


def join(port: int, rank: int) -> ProcessGroupGloo:
    """Join the group of a trainer (rank 0) and one worker (rank 1)."""
    store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, 2)


class GlooWeights:
    """Methods of the worker, by the names that Dynamo's worker calls."""

    model_runner: Any
    _group: ProcessGroupGloo | None = None

    def init_broadcaster(self, port: int) -> None:
        """Join the group."""
        self._group = join(port, 1)

    def destroy_broadcaster(self) -> None:
        """Leave the group."""
        self._group = None

    def update_weights_from_path(self, names: list[str], shapes: list[list[int]]) -> None:
        """Receive tensors in this order, and load them."""
        assert self._group is not None
        received = []
        for name, shape in zip(names, shapes, strict=True):
            tensor = torch.empty(shape)
            self._group.broadcast(tensor, 0).wait()
            received.append((name, tensor))
        self.model_runner.reload_weights(weights_iterator=received)

    def hang(self) -> None:
        """Wait for a sender that never comes."""
        import time

        time.sleep(3600)
