"""The command line: TensorRT-LLM's own arguments by their own names, and the flags of Dynamo's own worker."""

from __future__ import annotations

import argparse
import os
from typing import Any, Final

from dynamo_worker import StartError
from dynamo_worker.errors import shown
from dynamo_worker.kit import engine_arguments, model_arguments, mpi_job, rendezvous

#: The roles of a worker in disaggregated serving, by the names of Dynamo's own worker.
_MODES: Final = {
    **dict.fromkeys(("agg", "pd", "prefill_and_decode", "aggregated"), "aggregated"),
    "prefill": "prefill",
    "decode": "decode",
}
#: Flags of Dynamo's own worker for arguments that take precedence.
_OVERRIDES: Final = {
    "override_engine_args": "TensorRT-LLM's arguments as an object",
    "trtllm": "the same, or one of them: --trtllm.kv_cache_config.dtype fp8",
}
#: Flags of Dynamo's own worker for keys of ``kv_cache_config``.
_OF_CACHE: Final = {"kv_block_size": "tokens_per_block", "free_gpu_memory_fraction": "free_gpu_memory_fraction"}
#: Names that Dynamo's own worker has for arguments.
_ALIASES: Final = {"model": ["--model-path"], "moe_expert_parallel_size": ["--expert-parallel-size"]}
#: Arguments that are Python objects.
_OBJECTS: Final = ("mpi_session", "batched_logits_processor", "decoding_config")
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
    "encode_only": ((False, None), "this plugin serves models that generate text"),
}
#: Variables that make TensorRT-LLM run without MPI's ranks.
_WITHOUT_RANKS: Final = ("TLLM_DISABLE_MPI", "TLLM_WORKER_USE_SINGLE_PROCESS")
#: KV events that a rank keeps until they are fetched; as many as with Dynamo's own worker.
_EVENTS: Final = 100_000


def add(parser: argparse.ArgumentParser) -> None:
    """Add all flags.

    :raises StartError: TensorRT-LLM is not installed, or its installation is broken.
    """
    group = parser.add_argument_group(
        "TensorRT-LLM worker",
        "What dynamo-worker adds to TensorRT-LLM's own arguments. --override-engine-args and --trtllm take precedence "
        "over --extra-engine-args, and that over all other flags; nested settings are merged key by key. "
        "Environment variables are defaults: DYN_TRTLLM_MAX_SEQ_LEN that of --max-seq-len.",
    )
    _add(group, "served_model_name", metavar="NAME", help="name clients ask for (default: the model)")
    _add(group, "extra_engine_args", metavar="FILE", help="YAML file of TensorRT-LLM's arguments, as for trtllm-serve")
    _add(
        group,
        "override_engine_args",
        type=model_arguments.mapping,
        metavar="JSON",
        help="TensorRT-LLM's arguments as an object",
    )
    _add(
        group,
        "trtllm",
        type=model_arguments.mapping,
        metavar="JSON",
        help="the same; or one key: --trtllm.kv_cache_config.dtype fp8",
    )
    for name, key in _OF_CACHE.items():
        _add(group, name, type=model_arguments.value, metavar="NUMBER", help=f"`{key}` of --kv-cache-config")
    phases = "which phase of requests runs here: agg (both), or prefill or decode with --cache-transceiver-config"
    _add(group, "disaggregation_mode", type=_mode, default="agg", metavar="MODE", help=f"{phases} (default: agg)")
    _add(group, "modality", type=_modality, default="text", metavar="text", help="what the model reads and writes")
    events = ("--publish-kv-events", "--publish-events-and-metrics")
    group.add_argument(*events, action="store_true", help="tell routers which prefixes the KV cache holds")
    group.add_argument("--publish-metrics", action="store_true", help="publish TensorRT-LLM's own metrics")
    own = parser.add_argument_group("TensorRT-LLM", "Its own arguments. Settings of several keys are JSON or YAML.")
    for name, field in _llm_args().model_fields.items():
        options = model_arguments.options(field)
        if name in _SUPPORTED:
            options.pop("choices", None)  # the reason is said later
        if name not in _OBJECTS:
            _add(own, name, *_ALIASES.get(name, ()), **options)


def configure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's ``LLM`` for the parsed flags.

    :raises StartError: the file cannot be read, or an argument is unknown, wrong, not supported or without effect.
    """
    model = _llm_args()
    flags = {name: value for name, value in vars(args).items() if name in model.model_fields and value is not None}
    cache = {key: getattr(args, name) for name, key in _OF_CACHE.items() if getattr(args, name) is not None}
    file = args.extra_engine_args
    sources = {
        "the command line": model_arguments.merged(flags, {"kv_cache_config": cache} if cache else {}),
        f"--extra-engine-args {file}": model_arguments.read_file("--extra-engine-args", file) if file else {},
        "--override-engine-args": args.override_engine_args or {},
        "--trtllm": args.trtllm or {},
    }
    # The tokenizer is loaded although no text passes through: constraints and log-probabilities need it.
    # Metrics of requests cost some time in every step.
    defaults = {"enable_iter_perf_stats": True, **({"return_perf_metrics": True} if args.publish_metrics else {})}
    settings = model_arguments.merged(defaults, *sources.values())
    if not settings.get("model"):
        raise StartError("the model is missing", hint="--model NAME_OR_DIRECTORY")
    unset = {name: field.default for name, field in model.model_fields.items()}
    for names, why in _WITHOUT_EFFECT.items():
        engine_arguments.refuse_without_effect(
            argparse.Namespace(**settings), lambda parser: parser.set_defaults(**unset), names, why
        )
    for name, (supported, why) in _SUPPORTED.items():
        if name in settings and settings[name] not in supported:
            raise StartError(f"{name} = {shown(settings[name])} is not supported: {why}")
    for variable in _WITHOUT_RANKS:
        if os.environ.get(variable) == "1":
            raise StartError(f"{variable}=1 is not supported: this plugin supervises the ranks of MPI", hint="unset it")
    model_arguments.validate(model, sources, settings)
    if args.publish_kv_events:
        kept = settings.get("kv_cache_config") or {}
        settings["kv_cache_config"] = {**kept, "event_buffer_max_size": kept.get("event_buffer_max_size") or _EVENTS}
    return settings


def _llm_args() -> Any:
    """Import the model of the arguments, which joins an MPI job or makes one."""
    if mpi_job.size() == 1:
        rendezvous.stay_on_loopback()
    mpi_job.leave()
    install = "pip install 'dynamo-worker-trtllm[cuda]'"
    module = engine_arguments.import_engine("tensorrt_llm.llmapi.llm_args", name="TensorRT-LLM", install=install)
    return module.TorchLlmArgs


def _add(group: argparse._ArgumentGroup, name: str, *aliases: str, **options: Any) -> None:
    given = os.environ.get(f"DYN_TRTLLM_{name.upper()}")
    default = {"default": given} if given else {}
    group.add_argument("--" + name.replace("_", "-"), *aliases, dest=name, **{**options, **default})


def _mode(text: str) -> str:
    try:
        return _MODES[text]
    except KeyError:
        reason = "is not supported: this plugin serves text" if text == "encode" else "is unknown"
        raise argparse.ArgumentTypeError(f"{text} {reason}; expected agg, prefill or decode") from None


def _modality(text: str) -> str:
    if text != "text":
        raise argparse.ArgumentTypeError(f"{text} is not supported: this plugin serves models that generate text")
    return text
