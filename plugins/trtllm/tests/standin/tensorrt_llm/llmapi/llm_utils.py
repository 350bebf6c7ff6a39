"""Arguments from files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class KvCacheRetentionConfig:
    """How long the blocks of a request are kept; the stand-in evicts the least recently used."""

    token_range_retention_configs: list[Any] = field(default_factory=list)
    decode_retention_priority: int = 35
    decode_duration_ms: int | None = None


def update_llm_args_with_extra_dict(
    llm_args: dict[str, Any], llm_args_dict: dict[str, Any], extra_llm_api_options: str | None = None
) -> dict[str, Any]:
    """Return `llm_args` with the entries of `llm_args_dict` over it: a nested entry replaces the whole one below it.

    The exception is `kv_cache_config`, of which only the given keys are replaced.
    """
    merged = {**llm_args, **llm_args_dict}
    given = llm_args_dict.get("kv_cache_config")
    known = llm_args.get("kv_cache_config")
    if isinstance(given, dict) and known is not None:
        kept = known if isinstance(known, dict) else known.model_dump(exclude_unset=True)
        merged["kv_cache_config"] = {**kept, **given}
    return merged


def update_llm_args_with_extra_options(llm_args: dict[str, Any], extra_llm_api_options: str | None) -> dict[str, Any]:
    """Return `llm_args` with the entries of a YAML file over it; raises ValueError if it holds no mapping."""
    if not extra_llm_api_options:
        return llm_args
    extra = yaml.safe_load(Path(extra_llm_api_options).read_text()) or {}
    if not isinstance(extra, dict):
        raise ValueError(f"{extra_llm_api_options}: expected a mapping at the top, got {type(extra).__name__}")
    return update_llm_args_with_extra_dict(llm_args, extra, extra_llm_api_options)
