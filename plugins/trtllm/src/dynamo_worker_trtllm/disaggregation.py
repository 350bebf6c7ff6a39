"""Disaggregated serving: TensorRT-LLM's description of a prefill, from the prefill worker to the decode worker."""

from __future__ import annotations

import base64
import dataclasses
import random
from typing import TYPE_CHECKING, Any, Final

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import Logprob
from tensorrt_llm.llmapi.disagg_utils import get_global_disagg_request_id

from dynamo_worker import InvalidRequestError, StartError
from dynamo_worker.kit import disaggregation
from dynamo_worker.kit.fields import refusal
from dynamo_worker.kit.json_schema import check_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker_trtllm.sampling import Translated

#: Fields that name memory on the prefill worker for images, which this plugin does not serve.
_MULTIMODAL: Final = ("multimodal", "mrope")
_NODES: Final = 2**8
_PROCESSES: Final = 2**6


class Role(disaggregation.Role):
    """The phase of each request that this worker runs."""

    def __init__(self, mode: str, settings: Mapping[str, Any]) -> None:
        """Take the role.

        :param settings: the arguments of ``LLM``.
        :raises StartError: nothing transfers the KV cache.
        """
        super().__init__(mode)
        if mode != "aggregated" and not settings.get("cache_transceiver_config"):
            raise StartError(
                "--disaggregation-mode prefill and decode need a cache transceiver",
                hint="""--cache-transceiver-config '{"backend": "DEFAULT"}'""",
            )
        #: Node and process in the ids of this worker's requests, which also contain the time.
        self._place = (random.randrange(_NODES), random.randrange(_PROCESSES))

    def prepare_prefill(self, translated: Translated) -> None:
        """Tell TensorRT-LLM to stop after the prefill."""
        translated.params.max_tokens = 1
        translated.params.min_tokens = None
        # Otherwise an end-of-sequence token ends the request here, and there is nothing to hand over.
        translated.params.ignore_eos = True
        translated.options["disaggregated_params"] = DisaggregatedParams(
            request_type="context_only", disagg_request_id=get_global_disagg_request_id(*self._place)
        )

    def prepare_decode(self, translated: Translated, handed_over: Mapping[str, Any]) -> None:
        """Tell TensorRT-LLM where to fetch the KV cache.

        :raises InvalidRequestError: no prefill worker has said where.
        """
        if not handed_over:
            raise InvalidRequestError("prefill_result.disaggregated_params: expected a prefill worker's result")
        translated.options["disaggregated_params"] = unpack(handed_over)

    def hand_over(self, translated: Translated) -> Callable[[Any], dict[str, Any]] | None:
        """Return what turns TensorRT-LLM's description of a prefill into the router's; None without a prefill."""
        return pack if self.mode == "prefill" and "disaggregated_params" in translated.options else None


def pack(params: Any) -> dict[str, Any]:
    """Return TensorRT-LLM's description of a prefill as JSON, in the form that Dynamo's own workers use.

    So a decode worker of either can follow a prefill worker of the other.
    """
    packed = dataclasses.asdict(params)
    if packed.get("opaque_state") is not None:
        packed["opaque_state"] = base64.b64encode(packed["opaque_state"]).decode()
    if packed.get("first_gen_log_probs"):
        packed["first_gen_log_probs"] = [
            [{"token_id": token, **value} for token, value in position.items()]
            if isinstance(position, dict)
            else position
            for position in packed["first_gen_log_probs"]
        ]
    return packed


def unpack(packed: Mapping[str, Any]) -> DisaggregatedParams:
    """Return the description of a prefill that another worker has packed.

    :raises InvalidRequestError: it is not one.
    """
    name = "prefill_result.disaggregated_params"
    check_size(name, packed)
    known = {field.name for field in dataclasses.fields(DisaggregatedParams)}
    values = {
        key: value
        for key, value in packed.items()
        if key in known and value is not None and not key.startswith(_MULTIMODAL)
    }
    try:
        if "opaque_state" in values:
            values["opaque_state"] = base64.b64decode(values["opaque_state"], validate=True)
        if values.get("first_gen_log_probs"):
            values["first_gen_log_probs"] = [
                {entry["token_id"]: Logprob(entry["logprob"], entry.get("rank")) for entry in position}
                if isinstance(position, list)
                else position
                for position in values["first_gen_log_probs"]
            ]
        return DisaggregatedParams(**{**values, "request_type": "generation_only"})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise refusal(name, "a prefill worker's result", packed) from error
