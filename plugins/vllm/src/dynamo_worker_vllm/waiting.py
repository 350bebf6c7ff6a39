"""Changes in the processes that vLLM starts: on a CPU they sleep instead of spinning.

An EngineCore and its workers wait for each other in loops of ``sched_yield``. On a GPU there are cores to spare. On a
CPU the loops take cores from the model, the worker and the frontend, and Linux does not share them fairly: two loops on
two cores kept everything else from running for up to 1.8 s at a time (6.18, measured). Streams stalled, requests hit
the frontend's deadline, and throughput fell to between a half and a third. A sleep adds 0.1 ms to a step of some
milliseconds.

vLLM calls its general plugins in each of its processes. This one changes only those that belong to a dynamo-worker. It
also binds their stores to loopback (``dynamo_worker.kit.rendezvous``).
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from dynamo_worker.kit import rendezvous

log = logging.getLogger(__name__)

#: Marks the environment of the processes that belong to a dynamo-worker.
MARK: Final = "DYNAMO_WORKER_VLLM"
#: Tells the EngineCores what :mod:`~dynamo_worker_vllm.forward_passes` needs: the class of the scheduler, the id of the
#: worker and where to publish, as JSON.
FORWARD_PASSES: Final = "DYNAMO_WORKER_VLLM_FORWARD_PASSES"
#: Seconds; the kernel adds about as much.
_NAP = 50e-6


def install() -> None:
    """In a process of a dynamo-worker, bind the store to loopback, and on a CPU sleep instead of spinning."""
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
        log.warning("vLLM's processes spin while they wait: this version of vLLM is not supported")


def _nap() -> None:
    time.sleep(_NAP)
