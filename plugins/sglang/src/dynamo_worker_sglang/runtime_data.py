"""What SGLang's settings mean for frontends, routers and planners: values that are published with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

log = get_logger(__name__)


def runtime_data(settings: Mapping[str, Any], context_length: int, tokenizer: Any) -> dict[str, Any]:
    """Return the values by the names that Dynamo has for them.

    :param settings: SGLang's, resolved.
    :param context_length: longest sequence in tokens.
    :param tokenizer: the model's; None if SGLang has none.
    """
    data: dict[str, Any] = {
        # An answer that would not fit is shortened by the worker, so frontends need not reject the request.
        "token_budget": {
            "combined_limit": context_length,
            "reject_prompt_overflow": True,
            "reject_total_overflow": False,
        }
    }
    if gates_reasoning(settings["reasoning_parser"], tokenizer):
        data["tool_call_structural_tag_reasoning_gate"] = True
    steps = settings["speculative_num_steps"]
    if steps:
        data["spec_decode"] = {"nextn": steps, "source": "backend_config"}
        if settings["speculative_algorithm"]:
            data["spec_decode"]["method"] = str(settings["speculative_algorithm"])
    return data


def gates_reasoning(parser: str | None, tokenizer: Any) -> bool:
    """Return whether SGLang applies a grammar only after the reasoning, for requests that ask for it.

    Its scheduler needs the token that ends the reasoning.
    """
    if not parser or tokenizer is None:
        return False
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    detector = ReasoningParser(model_type=parser, stream_reasoning=False, tokenizer=tokenizer).detector
    return bool(tokenizer.encode(detector.think_end_token, add_special_tokens=False))


def uses_eagle(algorithm: str | None) -> bool:
    """Return whether SGLang keys its KV blocks by pairs of tokens, as its speculative algorithms of this kind do."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    try:
        return bool(SpeculativeAlgorithm.from_string(algorithm).is_eagle())
    except ValueError as error:
        log.warning("Routers are not told that SGLang speculates", algorithm=algorithm, error=error)
        return False
