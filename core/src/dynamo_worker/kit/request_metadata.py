"""Metadata of a request: priority, session, ranks, cache isolation, KV hints, LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit import request_limits as limits
from dynamo_worker.kit.fields import integer, rank, section, string
from dynamo_worker.kit.json_schema import check_size

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Marks cache salts in KV events, where they are untyped and among other strings (Dynamo's convention).
SALT_PREFIX: Final = "dynamo-cache-salt:"


def cache_salt(request: Mapping[str, Any]) -> str | None:
    """Return the salt that keeps this request's prefixes in the cache apart from those of other tenants."""
    for source in (section(request, "routing"), section(request, "nvext"), section(request, "extra_args", "nvext")):
        salt = source.get("cache_salt")
        if salt:
            limits.ID_CHARACTERS.check("cache_salt", len(string("cache_salt", salt)))
            return f"{SALT_PREFIX}{salt}"
    return None


def priority(request: Mapping[str, Any]) -> int | None:
    """Return the priority, or None if it is not set; the highest number goes first."""
    value = section(request, "routing").get("priority")
    return None if value is None else integer("routing.priority", value)


def dp_rank(request: Mapping[str, Any]) -> int | None:
    """Return the data-parallel rank that the router chose."""
    return rank("routing.dp_rank", section(request, "routing").get("dp_rank"))


def prefill_dp_rank(request: Mapping[str, Any]) -> int | None:
    """Return the data-parallel rank of the prefill worker that the router chose."""
    return rank("routing.prefill_dp_rank", section(request, "routing").get("prefill_dp_rank"))


def session_id(request: Mapping[str, Any]) -> str | None:
    """Return the id of the agent's session that the request belongs to."""
    value = section(request, "agent_context").get("session_id")
    if not isinstance(value, str):
        return None
    limits.ID_CHARACTERS.check("agent_context.session_id", len(value))
    return value.strip() or None


def kv_hint(request: Mapping[str, Any]) -> Any:
    """Return the orchestrator's instructions for the request's KV blocks, None if there are none."""
    hint = request.get("kv_hint")
    if hint is not None:
        check_size("kv_hint", hint)
    return hint


def lora_name(request: Mapping[str, Any]) -> str | None:
    """Return the name that selects the LoRA adapter: the router's choice, or the model asked for."""
    name = section(request, "routing").get("lora_name") or request.get("model")
    return name if isinstance(name, str) else None
