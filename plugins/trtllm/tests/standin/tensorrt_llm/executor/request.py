"""What goes through the request queue."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorrt_llm.conversation_params import ConversationParams
    from tensorrt_llm.disaggregated_params import DisaggregatedParams
    from tensorrt_llm.sampling_params import SamplingParams
    from tensorrt_llm.scheduling_params import SchedulingParams

DEFAULT_REQUEST_PRIORITY = 0.5


@dataclass(slots=True)
class LoRARequest:
    """Names the adapter of a request; raises ValueError if its path does not exist or its format is unknown."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_ckpt_source: str = "hf"

    def __post_init__(self) -> None:
        if self.lora_path is not None and not os.path.exists(self.lora_path):
            raise ValueError(f"lora_path ({self.lora_path}) does not exist.")
        if self.lora_ckpt_source not in ("hf", "nemo"):
            raise ValueError(f"lora_ckpt_source must be one of 'hf' or 'nemo', got {self.lora_ckpt_source}")

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path

    @property
    def ckpt_source(self) -> str:
        return self.lora_ckpt_source


class GenerationRequest:
    """One request; `id` is set by the executor.

    Raises ValueError for a priority outside 0…1, TypeError for a prompt that is no list of token ids.
    """

    def __init__(
        self,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        postproc_params: Any = None,
        query_token_ids: list[int] | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: dict[str, str] | None = None,
        multimodal_params: Any = None,
        scheduling_params: SchedulingParams | None = None,
        conversation_params: ConversationParams | None = None,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        priority: float = DEFAULT_REQUEST_PRIORITY,
    ) -> None:
        if not isinstance(prompt_token_ids, list):
            raise TypeError(f"prompt_token_ids ({prompt_token_ids}) should be a list of token ids")
        if not 0.0 <= priority <= 1.0:
            raise ValueError(f"priority must be between 0.0 and 1.0, got {priority}")
        self.id: int | None = None
        self.prompt_token_ids = prompt_token_ids
        self.query_token_ids = query_token_ids
        self.sampling_params = sampling_params
        self.postproc_params = postproc_params
        self.lora_request = lora_request
        self.prompt_adapter_request = prompt_adapter_request
        self.streaming = streaming
        self.kv_cache_retention_config = kv_cache_retention_config
        self.disaggregated_params = disaggregated_params
        self.trace_headers = trace_headers
        self.multimodal_params = multimodal_params
        self.scheduling_params = scheduling_params
        self.conversation_params = conversation_params
        self.cache_salt = cache_salt
        self.arrival_time = arrival_time
        self.priority = priority

    def set_id(self, request_id: int) -> GenerationRequest:
        """Number the request; raise AssertionError if it has a number."""
        assert self.id is None, f"Request ID is already set: {self.id}"
        self.id = request_id
        return self


@dataclass(slots=True)
class CancellingRequest:
    """Asks rank 0 to cancel a request."""

    id: int
