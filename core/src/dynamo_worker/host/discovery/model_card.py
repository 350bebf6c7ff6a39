"""Registers a model with frontends and routers: turns an ``EngineInfo`` into Dynamo's registration."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm import (
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    RouterConfig,
    RouterMode,
    WorkerType,
    register_model,
)

from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host.config.router_modes import ROUTER_MODES
from dynamo_worker.host.discovery.fleet import STATUS_ADDRESS
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dynamo.runtime import Endpoint

    from dynamo_worker.engine import EngineInfo
    from dynamo_worker.host.config.settings import WorkerSettings

#: What Dynamo's own workers tell frontends about tool calls unless they are told otherwise.
_STRUCTURAL_TAG: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "scope": "always",
        "schema": "auto",
        "allow_tool_calls_with_structured_output": False,
        "exclude_special_tokens": None,
        "reasoning_boundary": "auto",
        "tool_arguments_any_order": False,
    }
)
#: OpenAI surfaces of text generation: those of clients, that of routers to prefill workers, and none.
_SERVED: Final = ("chat", "completions", "prefill", "empty")
#: That of embeddings.
_EMBEDDINGS: Final = ("embedding",)
#: Longest chat template in bytes; those of models have some tens of thousands at most.
_MOST_TEMPLATE_BYTES = 1 << 20
#: How the runtime begins its refusal of a second entry under one key; keys have neither capitals nor punctuation.
_TAKEN: Final = "model update can"

log = get_logger(__name__)


def completed(
    info: EngineInfo,
    settings: WorkerSettings,
    topology: Mapping[str, Any] = MappingProxyType({}),
    status_address: str | None = None,
) -> EngineInfo:
    """Return the information to register: the engine's, completed by the worker's flags and by where the worker is.

    :param status_address: of the worker's status server, for `dynamo-worker top`; None if there is none.
    """
    chosen = {
        "tool_call_parser": settings.tool_call_parser,
        "reasoning_parser": settings.reasoning_parser,
        "exclude_tools_when_tool_choice_none": settings.exclude_tools_when_tool_choice_none,
        "kv_state_endpoint": settings.kv_state_endpoint,
        "structural_tag": _structural_tag(settings),
    }
    thinking = settings.default_thinking_mode
    return replace(
        info,
        endpoint_types=settings.endpoint_types or info.endpoint_types,
        runtime_config={**chosen, **topology, **info.runtime_config},
        runtime_data={
            **({} if thinking is None else {"default_thinking_mode": thinking}),
            **({} if status_address is None else {STATUS_ADDRESS: status_address}),
            **info.runtime_data,
        },
    )


def _structural_tag(settings: WorkerSettings) -> dict[str, Any] | None:
    """Return how frontends constrain tool calls, every key with its value; None if they do not."""
    given = settings.structural_tag
    enabled = given is not False and settings.enable_structural_tag is not False
    older = {"scope": settings.structural_tag_scope, "schema": settings.structural_tag_schema}
    chosen = given if isinstance(given, dict) else {name: value for name, value in older.items() if value is not None}
    return {**_STRUCTURAL_TAG, **chosen} if enabled else None


async def register(endpoint: Endpoint, info: EngineInfo, settings: WorkerSettings) -> int:
    """Register a model and its LoRA adapters; return the number of entries created in discovery.

    Each alias of a text engine's model has an entry of its own: in a request for an alias a frontend puts the model's
    name, and a server with several models would answer with the wrong one.

    :raises StartError: the model's directory has no configuration or tokenizer, the chat template cannot be read,
        or discovery refuses it.
    """
    template = settings.custom_jinja_template
    if template is not None:
        named = settings.origin("custom_jinja_template").describe("custom_jinja_template", template)
        _check_template(template, named)
    try:
        await register_model(
            _model_input(info),
            model_type(info.endpoint_types),
            endpoint,
            _source(info),
            info.model_name,
            worker_type=_worker_type(info.worker_type),
            kv_cache_block_size=info.kv_block_size,
            runtime_config=_runtime_config(info),
            custom_template_path=str(template) if template else None,
            needs=_needs(info),
            model_aliases=None if _is_text(info) else list(info.model_aliases) or None,
            router_config=_router_config(settings),
            # Frontends may place the first adapter on a worker that has none yet.
            max_gpu_lora_count=info.max_loras,
            skip_model_assets=_is_text(info),
        )
        for name in info.lora_adapters:
            await register_adapter(endpoint, info, name)
    except Exception as error:
        raise StartError(
            f"the model {info.model_name!r} at {info.model_path} cannot be registered: {error}",
            hint="check that the directory has config.json and a tokenizer",
        ) from error
    entries = 1 + len(info.lora_adapters)
    for name in info.model_aliases if _is_text(info) else ():
        entries += await _register_alias(endpoint, info, name)
    return entries


async def _register_alias(endpoint: Endpoint, info: EngineInfo, name: str) -> bool:
    """Register another name of a text engine's model; return whether it has an entry of its own.

    :raises StartError: discovery refuses it.
    """
    try:
        await register_adapter(endpoint, info, name)
    except Exception as error:
        if _TAKEN not in str(error):
            raise StartError(f"the model {name!r} cannot be registered: {error}") from error
        log.warning(
            "A model is not served: discovery takes its name for that of another one",
            model=name, next="let their names differ in letters or digits",
        )  # fmt: skip
        return False
    return True


async def register_adapter(endpoint: Endpoint, info: EngineInfo, name: str) -> None:
    """Register a LoRA adapter of a registered model as a separate model."""
    await register_model(
        _model_input(info),
        model_type(info.endpoint_types),
        endpoint,
        _source(info),
        name,
        worker_type=_worker_type(info.worker_type),
        needs=_needs(info),
        runtime_config=_runtime_config(info),
        kv_cache_block_size=info.kv_block_size,
        lora_name=name,
        base_model_path=_source(info),
        max_gpu_lora_count=info.max_loras,
        skip_model_assets=_is_text(info),
    )


def _is_text(info: EngineInfo) -> bool:
    return info.model_input == "text"


def _source(info: EngineInfo) -> str:
    """Return where the model comes from, which frontends compare: of workers that differ in it they use one only.

    They read none of its files if requests are text, and an engine's installation may lie anywhere.
    """
    return info.model_name if _is_text(info) else info.model_path or ""


def _check_template(path: Path, named: str) -> None:
    """Check a chat template before the runtime reads it, which would never finish reading a FIFO.

    :raises StartError: it is not a regular file, or too long.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StartError(f"{named} cannot be read: {error.strerror}") from error
    if size > _MOST_TEMPLATE_BYTES:
        raise StartError(f"{named} has {size} bytes; a chat template has at most {_MOST_TEMPLATE_BYTES}")


def check_endpoint_types(info: EngineInfo, settings: WorkerSettings, problem: Callable[[str], StartError]) -> None:
    """Check that the worker serves the OpenAI surfaces for which the model is registered.

    :param info: what the engine says of itself.
    :param problem: returns the error for a wrong engine.
    :raises UsageError: the operator chose surfaces that are not served.
    :raises StartError: the engine did.
    """
    if info.model_path is None or any(spec.registers_model and not spec.takes_tokens for spec in info.endpoints):
        return
    names = settings.endpoint_types or info.endpoint_types
    served = _SERVED if info.embeddings is None else _EMBEDDINGS
    wrong = [name for name in names if name not in served]
    if names and not wrong:
        return
    found = f"{', '.join(map(repr, wrong))} cannot be served" if wrong else "there is none"
    if info.embeddings is None:
        found += ": the engine generates text, which chat and completions are for"
    else:
        found += ": the engine makes embeddings, which embedding is for"
    if settings.endpoint_types:
        given = settings.origin("endpoint_types").describe("endpoint_types", ",".join(names))
        raise UsageError(
            f"{given}: {found}",
            hint="leave it to the engine; one that makes embeddings is often the same with another flag. "
            "Reranking, classification, images and the like need Dynamo's own worker",
        )
    raise problem(
        f"start returned an EngineInfo with endpoint_types {list(names)}: {found}; for others, offer an EndpointSpec "
        "with registers_model=True and takes_tokens=False"
    )


def model_type(names: Sequence[str]) -> ModelType:
    """Return the union of the OpenAI surfaces with these names.

    :raises UsageError: a name is unknown, or there is none.
    """
    known = {name.lower(): getattr(ModelType, name) for name in dir(ModelType) if name[0].isupper()}
    union: ModelType | None = None
    for name in names:
        if name not in known:
            raise UsageError(f"endpoint_types: {name!r} is unknown; expected some of {', '.join(sorted(known))}")
        union = known[name] if union is None else union | known[name]
    if union is None:
        raise UsageError("endpoint_types: expected at least one")
    return union


def _router_config(settings: WorkerSettings) -> RouterConfig | None:
    """Return how frontends shall route to this worker and its like; None if that is theirs to choose."""
    if "router_mode" not in settings.model_fields_set:
        return None
    mode = getattr(RouterMode, ROUTER_MODES[settings.router_mode])
    return RouterConfig(mode, KvRouterConfig() if mode == RouterMode.KV else None)


def _model_input(info: EngineInfo) -> ModelInput:
    model_input: ModelInput = getattr(ModelInput, info.model_input.capitalize())
    return model_input


def _worker_type(name: str) -> WorkerType:
    worker_type: WorkerType = getattr(WorkerType, name.capitalize())
    return worker_type


def _needs(info: EngineInfo) -> list[list[WorkerType]] | None:
    return [[_worker_type(name) for name in peers] for peers in info.needs] or None


def _runtime_config(info: EngineInfo) -> ModelRuntimeConfig:
    """Return the engine's figures for routers, and what frontends are told."""
    config = ModelRuntimeConfig()
    attributes = {
        "context_length": info.context_length,
        "total_kv_blocks": info.total_kv_blocks,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
        "data_parallel_start_rank": info.data_parallel_start_rank,
        "data_parallel_size": info.data_parallel_size,
        **info.runtime_config,
    }
    tag = attributes.pop("structural_tag", None)  # has a setter of its own
    for name, value in attributes.items():
        if value is not None:  # the setters refuse None
            setattr(config, name, value)
    config.set_structural_tag(tag)
    if info.bootstrap is not None:
        config.set_disaggregated_endpoint(*info.bootstrap)
    for key, value in info.runtime_data.items():
        config.set_engine_specific(key, json.dumps(value))  # accepts only JSON text, whatever its stub says
    return config
