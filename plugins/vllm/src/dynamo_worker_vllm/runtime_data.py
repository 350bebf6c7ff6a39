"""What vLLM's settings mean for frontends, routers and planners: values that are published with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def runtime_data(config: VllmConfig, stream_interval: int | None) -> dict[str, Any]:
    """Return the values by the names that Dynamo has for them.

    :param stream_interval: tokens between two chunks of an answer.
    """
    outputs = config.structured_outputs_config
    data: dict[str, Any] = {
        # An answer that would not fit is shortened by the worker, so frontends need not reject the request.
        "token_budget": {
            "combined_limit": config.model_config.max_model_len,
            "reject_prompt_overflow": True,
            "reject_total_overflow": False,
        },
        # vLLM applies a grammar only after the reasoning that its own parser recognizes.
        "tool_call_structural_tag_excludes_reasoning": bool(outputs.reasoning_parser)
        and not outputs.enable_in_reasoning,
    }
    if stream_interval is not None:
        data["stream_interval"] = stream_interval
    speculative = config.speculative_config
    if speculative is not None and speculative.num_speculative_tokens:
        data["spec_decode"] = {"nextn": speculative.num_speculative_tokens, "source": "backend_config"}
        if speculative.method:
            data["spec_decode"]["method"] = str(speculative.method)
    return data
