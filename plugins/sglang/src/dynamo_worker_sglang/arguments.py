"""The command line: all of SGLang's flags under their own names, and the one that dynamo-worker adds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import StartError
from dynamo_worker.kit import engine_arguments, forward_pass_metrics, rendezvous, weights
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from sglang.srt.server_args import ServerArgs

log = get_logger(__name__)

#: If this variable is set, another program places SGLang's ranks, possibly on other machines.
_PLACED_ELSEWHERE: Final = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
#: A flag of earlier versions that scripts still have.
_OLD_GRAPH_FLAG: Final = "--disable-piecewise-cuda-graph"
#: Flags of the tokenizer and the detokenizer.
_OF_TOKENIZERS: Final = ("tokenizer_worker_num", "detokenizer_worker_num")
#: Flags that only SGLang's HTTP and gRPC servers read (0.5.23).
_OF_ITS_SERVERS: Final = (
    *("api_key", "admin_api_key"),
    *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password", "enable_ssl_refresh"),
    *("enable_http2", "http2_max_concurrent_streams", "http2_initial_connection_window_size", "fastapi_root_path"),
    *("grpc_mode", "smg_grpc_mode", "grpc_port", "grpc_response_timeout_secs", "smg_http_sidecar_port"),
    *("sidecar_args", "warmups", "skip_server_warmup", "log_level_http", "uvicorn_access_log_exclude_prefixes"),
    *("tokenizer_metrics_custom_labels_header", "debug_tensor_dump_input_file"),
)
#: Flags of SGLang's OpenAI API.
_OF_ITS_API: Final = (
    *("trust_request_chat_template", "default_chat_template_kwargs", "chat_template", "completion_template"),
    *("hf_chat_template_name", "enable_cache_report", "return_input_ids", "return_output_ids", "tool_server"),
    *("stream_response_default_include_usage", "enable_response_store", "file_storage_path"),
    *("asr_max_buffer_seconds", "asr_max_concurrent_sessions"),
)
#: Flags without effect in a worker, and why.
_REFUSED: Final = {
    _OF_TOKENIZERS: "the frontend tokenizes and detokenizes",
    ("allow_auto_truncate",): "it rejects prompts that are too long",
    _OF_ITS_SERVERS: "SGLang's own server does not run here; clients use the Dynamo frontend, operators the status "
    "server (--control-token-file guards its control routes)",
    _OF_ITS_API: "the Dynamo frontend serves the OpenAI API",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add all flags.

    :raises StartError: SGLang is not installed, or its installation is broken.
    """
    group = parser.add_argument_group("SGLang worker", "What dynamo-worker adds to SGLang's own flags.")
    engine_arguments.add_publish_kv_events(group)
    weights.add_enable_rl(group, "DYN_SGL_ENABLE_RL")
    forward_pass_metrics.add_flag(group)
    engine_arguments.add_switch(
        group, "--embedding-worker", "DYN_SGL_EMBEDDING_WORKER", "serve /v1/embeddings, as SGLang's --is-embedding"
    )
    engine_arguments.add_switch(
        group,
        "--use-sglang-tokenizer",
        "DYN_SGL_USE_TOKENIZER",
        "let SGLang tokenize texts, which it does with --embedding-worker anyway",
    )
    group.add_argument(
        "--sglang-trace-level",
        type=int,
        choices=(1, 2, 3, 4),
        help="how much --enable-trace records, as SGLANG_TRACE_LEVEL",
    )
    _server_args().add_cli_args(parser)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}  # noqa: SLF001
    mode = actions["--disaggregation-mode"]
    mode.type, mode.choices = engine_arguments.disaggregation_mode("null"), None
    if _OLD_GRAPH_FLAG not in actions and "--cuda-graph-backend-prefill" in actions:
        group.add_argument(
            _OLD_GRAPH_FLAG,
            dest=actions["--cuda-graph-backend-prefill"].dest,
            action="store_const",
            const="disabled",
            default=argparse.SUPPRESS,
            help="older name of --cuda-graph-backend-prefill disabled",
        )
    # SGLang's default port is the same for all workers of a machine.
    parser.set_defaults(disaggregation_bootstrap_port=None)


def _server_args() -> Any:
    install = "pip install 'dynamo-worker-sglang[cuda]'"
    return engine_arguments.import_engine("sglang.srt.server_args", name="SGLang", install=install).ServerArgs


def configure(args: argparse.Namespace, private_dir: Path) -> ServerArgs:
    """Return SGLang's settings for the parsed flags.

    :param private_dir: directory for sockets.
    :raises StartError: a flag has no effect in a worker, or is not supported.
    """
    _check_embeddings(args)
    for flags, why in _REFUSED.items():
        engine_arguments.refuse_without_effect(args, _server_args().add_cli_args, flags, why)
    if args.sglang_trace_level is not None:
        os.environ["SGLANG_TRACE_LEVEL"] = str(args.sglang_trace_level)
    names = engine_arguments.served_names(args.served_model_name)
    args.served_model_name, args.served_model_aliases = (names[0] if names else None), names[1:]
    # The frontend tokenizes anyway.
    args.skip_tokenizer_init = False
    # Chunks carry only new tokens.
    args.incremental_streaming_output = True
    if args.disaggregation_bootstrap_port is None:
        args.disaggregation_bootstrap_port = _free_port()
    if args.publish_kv_events and args.kv_events_config is None:
        args.kv_events_config = json.dumps(engine_arguments.kv_events_config(private_dir))
    if args.nnodes == 1 and args.dist_init_addr is None and _PLACED_ELSEWHERE not in os.environ:
        loopback = rendezvous.stay_on_loopback()
        if args.disaggregation_mode == "null" and args.host != loopback:
            # Only the ranks' rendezvous would listen there.
            log.warning("Ignoring --host: SGLang's server does not run in a worker", host=args.host)
            args.host = loopback
    # SGLang collects evidence of a dead process for up to a minute before it reports it.
    for variable in ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"):
        os.environ.setdefault(variable, "0")
    # Makes the constructor of a node without a server return instead of waiting for its processes.
    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
    settings: ServerArgs = _server_args().from_cli_args(args)
    return settings


def _check_embeddings(args: argparse.Namespace) -> None:
    """Check the flags of a worker for embeddings, and make SGLang one.

    :raises StartError: some cannot be combined.
    """
    args.embedding_worker = args.is_embedding = args.embedding_worker or args.is_embedding
    engine_arguments.check_tokenizer(args, "--use-sglang-tokenizer", "sglang")
    if args.embedding_worker:
        engine_arguments.refuse_for_embeddings(
            args, {"disaggregation_mode": "null", "speculative_algorithm": None, "dllm_algorithm": None}
        )


def measure_forward_passes(args: argparse.Namespace, worker_id: int, private_dir: Path) -> None:
    """Have SGLang publish what its schedulers do, if the operator asks for it with a flag of SGLang or of the worker.

    :param private_dir: directory of the sockets.
    """
    if forward_pass_metrics.wanted(args) or args.enable_forward_pass_metrics:
        args.enable_forward_pass_metrics = True
        args.forward_pass_metrics_worker_id = str(worker_id)
        args.forward_pass_metrics_ipc_name = forward_pass_metrics.address(private_dir)


def _free_port() -> int:
    """Return a free TCP port below the range of outgoing connections."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise StartError("no free TCP port from 20000 to 31999", hint="set --disaggregation-bootstrap-port")
