"""What a prefill engine hands to a decode engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")


class DisaggScheduleStyle(IntEnum):
    """Which of the two phases is scheduled first."""

    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    """Say which phase a request runs, and carry the state that the other phase needs.

    Raises ValueError for an unknown `request_type`; case does not matter.
    """

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_log_probs: list[Any] | None = None
    first_gen_logits: list[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: DisaggScheduleStyle | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    multimodal_hashes: list[list[int]] | None = None
    mrope_position_ids_handle: dict[str, Any] | None = None
    mrope_position_deltas_handle: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.request_type is None:
            return
        self.request_type = self.request_type.lower()
        if self.request_type not in REQUEST_TYPES:
            raise ValueError(f"request_type: expected one of {', '.join(REQUEST_TYPES)}, got {self.request_type!r}")
