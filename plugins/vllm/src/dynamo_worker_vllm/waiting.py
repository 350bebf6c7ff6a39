"""What is different in the processes that vLLM starts: on a CPU they sleep where vLLM would spin.

An EngineCore and its workers wait for each other in loops of ``sched_yield``. On a GPU they have cores to spare. On a
CPU they take them from the model, the worker and the frontend, and Linux does not divide them fairly: two such loops
on two cores kept everything else on a core from running for up to 1.8 s at a time (6.18, measured), with streams that
stood still, requests that ran into the frontend's deadline, and half to a third of the tokens per second. A sleep adds
a tenth of a millisecond to a step of some milliseconds.

vLLM calls what is registered as one of its general plugins in each of its processes. This changes only those that
belong to a dynamo-worker. It also has their stores listen on loopback (``dynamo_worker.kit.rendezvous``).
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from dynamo_worker.kit import rendezvous

log = logging.getLogger(__name__)

#: Set in the environment of the processes that belong to a dynamo-worker.
MARK: Final = "DYNAMO_WORKER_VLLM"
#: Seconds to sleep; the kernel adds about as much.
_NAP = 50e-6


def install() -> None:
    """Keep this process's store to this machine if it is one of a dynamo-worker, and let it sleep if it is on a CPU."""
    if MARK not in os.environ:
        return
    rendezvous.listen_on_loopback()
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if hasattr(shm_broadcast, "sched_yield"):
        shm_broadcast.sched_yield = _nap
    else:
        log.warning("vLLM's processes spin while they wait: this version is not known")


def _nap() -> None:
    time.sleep(_NAP)
