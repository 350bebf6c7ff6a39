"""What a started engine class says about itself, in the worker's terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import EngineInfo, StartError
from dynamo_worker.kit.disaggregation import Role
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

log = get_logger(__name__)

#: What a ``WorkerConfig`` may say that only the worker's own flags decide here, and those flags.
_FLAGS: Final = {
    "custom_jinja_template": "--custom-jinja-template",
    "media_decoder": "none: no media here",
    "media_fetcher": "none: no media here",
    "metrics_labels": "none: the worker has its own",
}
#: What it says that is registered with the model.
_REGISTERED: Final = ("tool_call_parser", "reasoning_parser", "kv_state_endpoint", "structural_tag")
_MODES: Final = {"agg": "aggregated"}


def mode(config: Any) -> str:
    """Return the phase of requests: ``aggregated``, ``prefill``, ``decode`` or ``encode``."""
    name = str(config.disaggregation_mode.value)
    return _MODES.get(name, name)


def describe(path: str, made: Any, config: Any, *, kv_events: bool) -> EngineInfo:
    """Return what the worker registers.

    :param path: ``module:Class``, for messages.
    :param made: the ``EngineConfig`` that ``start`` has returned.
    :param config: the ``WorkerConfig`` of ``from_args``.
    :param kv_events: whether the class publishes KV events.
    :raises StartError: ``start`` has returned something else, or the class takes no tokens.
    """
    from dynamo.common.backend import EngineConfig, LlmRegistration
    from dynamo.llm import ModelInput

    if not isinstance(made, EngineConfig):
        raise StartError(f"--engine-class {path}: start must return an EngineConfig, got {made!r:.200}")
    if config.model_input != ModelInput.Tokens:
        raise StartError(f"--engine-class {path}: its WorkerConfig has model_input {config.model_input}, not Tokens")
    llm = made.llm or LlmRegistration()
    role = Role(mode(config))
    _warn_of_unused(config)
    needs = [*role.needs, *([("encode",)] if config.route_to_encoder else [])]
    host, port = llm.bootstrap_host, llm.bootstrap_port
    return EngineInfo(
        model_name=made.served_model_name or config.served_model_name or made.model,
        model_path=made.model,
        model_aliases=tuple(made.model_aliases),
        endpoint_types=_endpoint_types(config, role),
        worker_type=role.mode,
        needs=needs,
        context_length=_integer(llm.context_length),
        vocab_size=vocabulary(made.model),
        kv_block_size=_integer(llm.kv_cache_block_size),
        total_kv_blocks=_integer(llm.total_kv_blocks),
        max_num_seqs=_integer(llm.max_num_seqs),
        max_num_batched_tokens=_integer(llm.max_num_batched_tokens),
        data_parallel_start_rank=_integer(llm.data_parallel_start_rank) or 0,
        data_parallel_size=_integer(llm.data_parallel_size) or 1,
        max_loras=_integer(llm.max_gpu_lora_count),
        bootstrap=(host, int(port)) if host and port else None,
        runtime_config=_runtime_config(config, llm, role, kv_events=kv_events),
        runtime_data=_runtime_data(config, made),
    )


def _endpoint_types(config: Any, role: Role) -> tuple[str, ...]:
    if role.mode == "prefill":
        return role.endpoint_types
    return tuple(name.strip() for name in config.endpoint_types.split(",") if name.strip())


def _runtime_config(config: Any, llm: Any, role: Role, *, kv_events: bool) -> Mapping[str, Any]:
    values: dict[str, Any] = {
        "enable_local_indexer": config.enable_local_indexer and role.mode != "decode",
        "kv_event_publishing_enabled": kv_events,
    }
    values |= {name: getattr(config, name) for name in _REGISTERED if getattr(config, name) is not None}
    if not config.exclude_tools_when_tool_choice_none:
        values["exclude_tools_when_tool_choice_none"] = False
    if llm.enable_eagle:
        values["enable_eagle"] = True
    return values


def _runtime_data(config: Any, made: Any) -> Mapping[str, Any]:
    thinking = config.default_thinking_mode
    return {**({} if thinking is None else {"default_thinking_mode": thinking}), **(made.runtime_data or {})}


def _warn_of_unused(config: Any) -> None:
    for name, flag in _FLAGS.items():
        if getattr(config, name):
            log.warning("The engine class sets what only the worker's own flags set", setting=name, flag=flag)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def vocabulary(model: str) -> int | None:
    """Return the number of token ids of a model, from the files in its directory; None if it has none there.

    That is the larger one of what its configuration and its tokenizer say: either may count fewer.
    """
    directory = Path(model)
    config = _json(directory / "config.json")
    sizes = [section.get("vocab_size") for section in (config, config.get("text_config")) if isinstance(section, dict)]
    known = [size for size in sizes if isinstance(size, int)]
    if not known:
        return None
    tokenizer = _json(directory / "tokenizer.json")
    added = tokenizer.get("added_tokens")
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max(*known, *(token + 1 for token in ids if isinstance(token, int)), 0)


def first_token(model: str) -> int:
    """Return the token with which prompts of a model begin, from the files in its directory; 1 without any."""
    config = _json(Path(model) / "config.json")
    for name in ("bos_token_id", "eos_token_id"):
        token = config.get(name)
        if isinstance(token, int):
            return token
    return 1


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
