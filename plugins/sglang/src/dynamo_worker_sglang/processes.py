"""The processes that SGLang starts: their titles, and their imports ahead of time."""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING, Final

from dynamo_worker.kit import preload
from dynamo_worker.kit.engine_arguments import EarlyParser
from dynamo_worker.kit.preload import Level

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The titles of SGLang's processes begin like this: ``sglang::scheduler``, ``sglang::data_parallel_controller``.
TITLE: Final = b"sglang::"
#: Seconds until the kernel has also killed the processes below one that was killed.
KILLED_SECONDS: Final = 0.3

#: The modules that a scheduler and a data-parallel controller import first.
_SCHEDULER = ("dynamo_worker_sglang.scheduler",)
_CONTROLLER = ("sglang.srt.managers.data_parallel_controller", *_SCHEDULER)

#: Variables that are set while SGLang starts and that no import reads.
_HARMLESS: Final = frozenset(
    {
        *("SGLANG_RUN_ID", "SGLANG_BLOCK_NONZERO_RANK_CHILDREN", "SGLANG_PYSPY_DUMP_BEFORE_CRASH"),
        *("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "SGLANG_USE_CUDA_IPC_TRANSPORT", "GLOO_SOCKET_IFNAME"),
        "DYN_FPM_TRACE",
    }
)
#: A variable that ``--enable-metrics`` sets, and the only module that reads it on import.
_READERS: Final = {"PROMETHEUS_MULTIPROC_DIR": "prometheus_client"}
#: What SGLang sets by default. Where flags or the model change it, the preloaded processes restart.
_EXPECTED: Final = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "CUTE_DSL_LOG_LEVEL": "30",
    "CUTE_DSL_LOG_TO_CONSOLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "SGLANG_DISABLE_OUTLINES_DISK_CACHE": "0",
    "SGLANG_ENABLE_DETERMINISTIC_INFERENCE": "0",
    "SGLANG_ENABLE_TORCH_COMPILE": "0",
    "TRTLLM_ENABLE_PDL": "1",
}
#: The lowest soft limits with which SGLang starts its processes: open files, and bytes of stack.
_LIMITS: Final = {resource.RLIMIT_NOFILE: 65535, resource.RLIMIT_STACK: 65535 * 1024}


def preload_processes(arguments: Sequence[str]) -> None:
    """Let the processes that SGLang will start for this command line import SGLang now, in parallel with this one.

    Every rank has a scheduler. A controller starts those of data-parallel replicas. Those of data-parallel attention
    are not preloaded, because their parent depends on SGLang's version.
    """
    parser = EarlyParser()
    parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pp-size", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--dp-size", "--data-parallel-size", type=int, default=1)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--enable-dp-attention", action="store_true")
    parser.add_argument("--attn-dp-size", type=int, default=1)
    given = parser.read(arguments)
    if given is None or given.enable_dp_attention or given.attn_dp_size > 1:
        return
    schedulers = Level(_SCHEDULER, given.dp_size * given.tp_size * given.pp_size // max(given.nnodes, 1))
    levels = [schedulers] if given.dp_size == 1 else [Level(_CONTROLLER), schedulers]
    for number, least in _LIMITS.items():
        soft, hard = resource.getrlimit(number)
        if soft < least:
            with contextlib.suppress(ValueError):  # above the hard limit; SGLang cannot raise it either
                resource.setrlimit(number, (least, hard))
    preload.prepare(levels, _HARMLESS, readers=_READERS, expected=_EXPECTED)
