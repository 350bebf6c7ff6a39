"""The engines of the fleet: the echo engine in its kinds, and real ones with a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chaos_run.clients import SMALL_KINDS, Model, echo
from chaos_run.fleet import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

#: Tokens per second of each stream of the echo engine: long answers last ten seconds.
_RATE: Final = ("--tokens-per-second", "40")
_PROCESSES: Final = {"core": r"echo_process:Core", "rank": r"echo_process rank"}
_TOKENS: Final = Model("echo", 0.7, echo)
_TEXT: Final = Model("echo-text", 0.3, echo)


def _in_process() -> Engine:
    return Engine("in-process", ("--engine", "echo", *_RATE), _TOKENS)


def _process() -> Engine:
    return Engine("process", ("--engine", "echo", "--process-tree", *_RATE), _TOKENS, _PROCESSES)


def _text() -> Engine:
    flags = ("--engine", "echo", "--text", "--process-tree", "--model-name", "echo-text", *_RATE)
    return Engine("text", flags, _TEXT, _PROCESSES, moves=False)


def _transformers() -> Engine:
    flags = ("--engine", "transformers", "--model", "{model}", "--served-model-name", "tiny-transformers")
    sizes = ("--page-size", "32", "--num-blocks", "256", "--max-model-len", "2048")
    return Engine(
        "transformers",
        (*flags, *sizes),
        Model("tiny-transformers", 0.2, None, SMALL_KINDS),
        {"core": r"dynamo_worker_transformers\.core:Core"},
        start_seconds=180.0,
        environment={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        tiny_model=True,
    )


def _vllm() -> Engine:
    flags = ("--engine", "vllm", "--model", "{model}", "--served-model-name", "tiny-vllm")
    sizes = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
    return Engine(
        "vllm",
        (*flags, *sizes),
        Model("tiny-vllm", 0.2, None, SMALL_KINDS),
        {"core": r"VLLM::EngineCore", "worker": r"VLLM::Worker"},
        start_seconds=300.0,
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
        tiny_model=True,
    )


#: Every engine by the name that the command line has for it.
ENGINES: Final[dict[str, Callable[[], Engine]]] = {
    "in-process": _in_process,
    "process": _process,
    "text": _text,
    "transformers": _transformers,
    "vllm": _vllm,
}
