"""The command line: TensorRT-LLM's own arguments by their own names, and the flags of Dynamo's own worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import StartError
from dynamo_worker.kit import engine_arguments, forward_pass_metrics, mpi_job, rendezvous
from dynamo_worker.kit.model_arguments import CommandLine

if TYPE_CHECKING:
    import argparse

#: The flags of Dynamo's own worker for objects of arguments.
_OVERRIDES: Final = {
    "override_engine_args": "TensorRT-LLM's arguments as an object",
    "trtllm": "the same; or one key: --trtllm.kv_cache_config.dtype fp8",
}
#: Those for keys of an argument.
_PARTS: Final = {
    "kv_block_size": ("kv_cache_config", "tokens_per_block"),
    "free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
}
#: Names that Dynamo's own worker has for arguments.
_ALIASES: Final = {"model": ["--model-path"], "moe_expert_parallel_size": ["--expert-parallel-size"]}
#: Arguments that are Python objects, and one whose flag is the worker's.
_NO_FLAGS: Final = ("mpi_session", "batched_logits_processor", "decoding_config", "reasoning_parser")
#: Why nothing else is served.
_TEXT: Final = "this plugin serves models that generate text"
#: Arguments without effect in a worker, and why.
_WITHOUT_EFFECT: Final = {
    ("num_postprocess_workers", "postprocess_tokenizer_dir", "post_processor_hook"): "the frontend detokenizes",
    ("reasoning_parser",): "the frontend parses answers (the worker's own flag of this name tells it how)",
    ("num_serve_frontends", "enable_energy_metrics"): "TensorRT-LLM's own server does not run here",
    ("gather_generation_logits",): "no answer contains logits",
}
#: Arguments of which only some values are supported, and why.
_SUPPORTED: Final = {
    "max_beam_width": ((1, None), "requests for beam search are refused"),
    "backend": (("pytorch", None), "this plugin is for the PyTorch backend"),
    "orchestrator_type": ((None,), "this plugin supervises the ranks of MPI"),
    "encode_only": ((False, None), _TEXT),
}
#: What other workers of Dynamo serve.
_MODALITIES: Final = ("multimodal", "video_diffusion", "image_diffusion")
#: Variables that make TensorRT-LLM run without MPI's ranks.
_WITHOUT_RANKS: Final = ("TLLM_DISABLE_MPI", "TLLM_WORKER_USE_SINGLE_PROCESS")
#: KV events that a rank keeps until they are fetched; as many as with Dynamo's own worker.
_EVENTS: Final = 100_000


def add(parser: argparse.ArgumentParser) -> None:
    """Add all flags.

    :raises StartError: TensorRT-LLM is not installed, or its installation is broken.
    """
    line = _command_line()
    group = parser.add_argument_group(
        "TensorRT-LLM worker",
        "What dynamo-worker adds to TensorRT-LLM's own arguments. --override-engine-args and --trtllm take precedence "
        "over --extra-engine-args, and that over all other flags; nested settings are merged key by key. "
        "Environment variables are defaults: DYN_TRTLLM_MAX_SEQ_LEN that of --max-seq-len.",
    )
    line.add_flag(group, "served_model_name", metavar="NAME", help="name clients ask for (default: the model)")
    line.add_sources(group)
    mode = engine_arguments.disaggregation_mode()
    modality = engine_arguments.keyword({"text": "text"}, "text", dict.fromkeys(_MODALITIES, _TEXT))
    phases = "which phase of requests runs here: agg (both), or prefill or decode with --cache-transceiver-config"
    line.add_flag(
        group, "disaggregation_mode", type=mode, default="agg", metavar="MODE", help=f"{phases} (default: agg)"
    )
    line.add_flag(
        group, "modality", type=modality, default="text", metavar="text", help="what the model reads and writes"
    )
    events = ("--publish-kv-events", "--publish-events-and-metrics")
    group.add_argument(
        *events,
        action="store_true",
        default=engine_arguments.switched_on("DYN_TRTLLM_PUBLISH_KV_EVENTS"),
        help="tell routers which prefixes the KV cache holds",
    )
    forward_pass_metrics.add_flag(group)
    group.add_argument(
        "--publish-metrics",
        action="store_true",
        default=engine_arguments.switched_on("DYN_TRTLLM_PUBLISH_METRICS"),
        help="publish TensorRT-LLM's own metrics",
    )
    own = parser.add_argument_group("TensorRT-LLM", "Its own arguments. Settings of several keys are JSON or YAML.")
    line.add_arguments(own)


def configure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's ``LLM`` for the parsed flags.

    :raises StartError: the file cannot be read, or an argument is unknown, wrong, not supported or without effect.
    """
    for variable in _WITHOUT_RANKS:
        if os.environ.get(variable) == "1":
            raise StartError(f"{variable}=1 is not supported: this plugin supervises the ranks of MPI", hint="unset it")
    # The tokenizer is loaded although no text passes through: constraints and log-probabilities need it. Metrics of
    # requests cost some time in every step.
    metrics = {"return_perf_metrics": True} if args.publish_metrics else {}
    settings = _command_line().read(args, {"enable_iter_perf_stats": True, **metrics})
    if args.publish_kv_events:
        kept = settings.get("kv_cache_config") or {}
        settings["kv_cache_config"] = {**kept, "event_buffer_max_size": kept.get("event_buffer_max_size") or _EVENTS}
    return settings


def _command_line() -> CommandLine:
    """Import TensorRT-LLM's arguments, which joins an MPI job or makes one."""
    if mpi_job.size() == 1:
        rendezvous.stay_on_loopback()
    mpi_job.leave()
    install = "pip install 'dynamo-worker-trtllm[cuda]'"
    module = engine_arguments.import_engine("tensorrt_llm.llmapi.llm_args", name="TensorRT-LLM", install=install)
    return CommandLine(
        module.TorchLlmArgs,
        "DYN_TRTLLM_",
        file=("extra_engine_args", "YAML file of TensorRT-LLM's arguments, as for trtllm-serve"),
        objects=_OVERRIDES,
        parts=_PARTS,
        aliases=_ALIASES,
        no_flags=_NO_FLAGS,
        required={"model": "--model NAME_OR_DIRECTORY"},
        without_effect=_WITHOUT_EFFECT,
        supported=_SUPPORTED,
    )
