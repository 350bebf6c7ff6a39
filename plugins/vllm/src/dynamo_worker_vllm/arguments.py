"""The command line: all of vLLM's engine flags under their own names, and those that dynamo-worker adds."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import StartError
from dynamo_worker.kit import (
    engine_arguments,
    forward_pass_metrics,
    image_requests,
    media_settings,
    own_address,
    rendezvous,
    weights,
)
from dynamo_worker_vllm import disaggregation, waiting

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

#: The variable with the address at which NIXL's other side asks for the blocks of this one.
NIXL_HOST: Final = "VLLM_NIXL_SIDE_CHANNEL_HOST"

#: Flags about images that vLLM would fetch itself.
_OF_ITS_FETCH: Final = ("allowed_local_media_path", "allowed_media_domains", "media_io_kwargs")
#: Flags that only vLLM's own server reads (0.31).
_OF_ITS_SERVER: Final = ("interleave_mm_strings", "default_mm_loras", "data_parallel_multi_port_external_lb")


def add(parser: argparse.ArgumentParser) -> None:
    """Add all flags.

    :raises StartError: vLLM is not installed, or its installation is broken.
    """
    group = parser.add_argument_group("vLLM worker", "What dynamo-worker adds to vLLM's own flags.")
    group.add_argument(
        "--disaggregation-mode",
        type=engine_arguments.disaggregation_mode(),
        default=os.environ.get("DYN_VLLM_DISAGGREGATION_MODE") or "aggregated",
        metavar="MODE",
        help="the phase of each request that this worker runs: agg (both), prefill, which needs --kv-transfer-config, "
        "or decode, which computes every prompt itself without it (default: agg)",
    )
    group.add_argument("--config", metavar="FILE", help="YAML file of vLLM's flags")
    engine_arguments.add_publish_kv_events(group)
    weights.add_enable_rl(group, "DYN_ENABLE_RL")
    forward_pass_metrics.add_flag(group)
    image_requests.add_flag(group, "DYN_VLLM_ENABLE_MULTIMODAL")
    media_settings.add_flags(parser)
    group.add_argument(
        "--headless",
        action="store_true",
        default=engine_arguments.switched_on("DYN_VLLM_HEADLESS"),
        help="run only this node's ranks of a multi-node engine: no endpoints, same supervision",
    )
    embeddings = parser.add_argument_group("vLLM embeddings", "Instead of text, the worker makes embeddings.")
    engine_arguments.add_switch(
        embeddings,
        "--embedding-worker",
        "DYN_VLLM_EMBEDDING_WORKER",
        "serve /v1/embeddings with a pooling model; implies --runner pooling",
    )
    engine_arguments.add_switch(
        embeddings,
        "--embedding-frontend-tokenization",
        "DYN_VLLM_EMBEDDING_FRONTEND_TOKENIZATION",
        "let the frontend tokenize texts; otherwise vLLM does",
    )
    engine_arguments.add_switch(
        embeddings,
        "--use-vllm-tokenizer",
        "DYN_VLLM_USE_TOKENIZER",
        "let vLLM tokenize texts, which is the default of --embedding-worker",
    )
    _engine_args().add_cli_args(parser)
    # As vLLM's own command line has it: `-O3`.
    level = next(action for action in parser._actions if "--optimization-level" in action.option_strings)  # noqa: SLF001
    group.add_argument("-O", dest=level.dest, type=level.type or str, default=argparse.SUPPRESS, metavar="LEVEL")


def _engine_args() -> Any:
    install = "pip install 'dynamo-worker-vllm[cuda]' or 'dynamo-worker-vllm[cpu]'"
    return engine_arguments.import_engine("vllm.engine.arg_utils", name="vLLM", install=install).AsyncEngineArgs


def configure(args: argparse.Namespace, private_dir: Path) -> VllmConfig:
    """Return vLLM's configuration for the parsed flags; takes seconds and may download the model's files.

    :param private_dir: directory for sockets.
    :raises StartError: vLLM rejects the flags, or the model does not exist.
    """
    from vllm.usage.usage_lib import UsageContext

    why = "vLLM's own server does not run here; the Dynamo frontend serves the OpenAI API"
    engine_arguments.refuse_without_effect(args, _engine_args().add_cli_args, _OF_ITS_SERVER, why)
    why = "the worker loads images itself; see --media-allow-path and --media-allow-host"
    engine_arguments.refuse_without_effect(args, _engine_args().add_cli_args, _OF_ITS_FETCH, why)
    _check_embeddings(args)
    args.served_model_name = engine_arguments.served_names(args.served_model_name) or None
    os.environ[waiting.MARK] = "1"
    alone = on_one_machine(args)
    if alone:
        rendezvous.stay_on_loopback("VLLM_HOST_IP")
    engine_args = _engine_args().from_cli_args(args)
    if args.enable_rl:
        _report_sampled_logprobs(engine_args)
    # vLLM itself checks speculative, pooling and other special settings.
    if args.publish_kv_events and engine_args.kv_events_config is None:
        from vllm.config import KVEventsConfig

        events = engine_arguments.kv_events_config(private_dir)
        if not alone:
            # vLLM reports this machine's address and the free port to the leader of several nodes.
            events["endpoint"] = "tcp://*:0"
        engine_args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, **events)
    try:
        config: VllmConfig = engine_args.create_engine_config(UsageContext.ENGINE_CONTEXT, headless=args.headless)
    except Exception as error:
        raise StartError(f"vLLM rejects these settings: {_first_lines(error)}") from error
    if "NixlConnector" in disaggregation.connectors(config):
        # vLLM's default is localhost: decode workers in other pods would ask themselves.
        own_address.advertise(NIXL_HOST)
    return config


def _check_embeddings(args: argparse.Namespace) -> None:
    """Check the flags for embeddings against each other and the rest, and make vLLM run the model for pooling.

    :raises StartError: some cannot be combined.
    """
    engine_arguments.check_tokenizer(args, "--use-vllm-tokenizer", "vllm")
    if args.embedding_frontend_tokenization and not args.embedding_worker:
        raise StartError(
            "--embedding-frontend-tokenization needs --embedding-worker", hint="leave it out, or give both"
        )
    if not args.embedding_worker:
        return
    if args.embedding_frontend_tokenization and args.use_vllm_tokenizer:
        raise StartError(
            "--embedding-frontend-tokenization and --use-vllm-tokenizer exclude each other: one of them tokenizes",
            hint="leave one of them out",
        )
    if args.runner not in ("auto", "pooling"):
        raise StartError(
            f"--embedding-worker needs a model that runs for pooling, not --runner {args.runner}",
            hint="leave --runner out, or --embedding-worker for a model that generates",
        )
    args.runner = "pooling"
    of_generation = {
        "disaggregation_mode": "aggregated",
        "enable_multimodal": False,
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    engine_arguments.refuse_for_embeddings(args, of_generation)


def _report_sampled_logprobs(engine_args: Any) -> None:
    """Let vLLM report the log-probabilities with which it samples, which trainers need.

    :raises StartError: the flags ask for others.
    """
    if engine_args.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):  # the first is vLLM's default
        raise StartError(
            f"--enable-rl: trainers need --logprobs-mode processed_logprobs, not {engine_args.logprobs_mode}",
            hint="leave --logprobs-mode out",
        )
    engine_args.logprobs_mode = "processed_logprobs"


def on_one_machine(args: argparse.Namespace) -> bool:
    """Return whether no process on another machine needs to reach vLLM's processes."""
    local = args.data_parallel_size_local
    return (
        args.nnodes == 1
        and not args.headless
        and local in (None, args.data_parallel_size)
        # Otherwise the ranks are separate workers, which meet elsewhere.
        and args.data_parallel_rank is None
        and args.data_parallel_start_rank is None
        and args.data_parallel_address is None
        and "ray" not in (args.data_parallel_backend, args.distributed_executor_backend)
        # Otherwise other machines fetch KV caches or embeddings from here.
        and args.kv_transfer_config is None
        and args.ec_transfer_config is None
    )


def _first_lines(error: Exception) -> str:
    """Return an exception's message in one line, without pydantic's links."""
    lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
    return " ".join(line for line in lines if line)[:1000] or type(error).__name__
