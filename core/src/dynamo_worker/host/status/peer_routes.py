"""Every control route of Dynamo's own workers for text models, and what becomes of it here.

Messages and documentation come from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class PeerRoute:
    """One control route of Dynamo's own workers.

    :param path: below ``/engine/``.
    :param workers: the workers that have it.
    :param body: the fields of the request.
    :param answer: the fields of the answer, beside ``status`` and ``message``.
    :param remark: what differs here.
    :param refused: why there is no such route here, and what to do instead; empty if there is one.
    """

    path: str
    workers: tuple[str, ...]
    body: str = ""
    answer: str = ""
    remark: str = ""
    refused: str = ""


_VLLM, _SGLANG, _TRTLLM = "vLLM", "SGLang", "TensorRT-LLM"
_SCALING: Final = (
    "elastic expert parallelism is not supported: start a worker with another number of ranks, and drain this one"
)
_SUCCESS: Final = "`status` is `success`; under `control/` it is `ok`"
_MODES: Final = "leaves discovery meanwhile; " + _SUCCESS

#: All of them. Those that have no ``control/`` in front are also found with it.
PEER_ROUTES: Final = (
    PeerRoute("control/sleep", (_VLLM,), "`level`", remark="requests in flight finish first, or as `mode` says"),
    PeerRoute("control/wake_up", (_VLLM,), "`tags`"),
    PeerRoute("control/start_profile", (_VLLM,), "`profile_prefix`", remark="a name, not a path"),
    PeerRoute(
        "control/start_profile",
        (_SGLANG,),
        "SGLang's `ProfileReq`",
        remark="`output_dir` must be below a root",
    ),
    PeerRoute("control/stop_profile", (_VLLM, _SGLANG)),
    PeerRoute("control/scale_elastic_ep", (_VLLM, _SGLANG), refused=_SCALING),
    PeerRoute("control/ep_capacity", (_VLLM,), refused=_SCALING),
    PeerRoute("control/is_scaling_elastic_ep", (_SGLANG,), refused=_SCALING),
    PeerRoute("update/model_taints", (_VLLM, _SGLANG), "`taints`: list of strings", "`taints`", "every engine has it"),
    PeerRoute("control/release_memory_occupation", (_TRTLLM,), "`tags`, `timeout_s`"),
    PeerRoute("control/resume_memory_occupation", (_TRTLLM,), "`tags`"),
    PeerRoute("release_memory_occupation", (_SGLANG,), "`tags`", remark=_MODES),
    PeerRoute("resume_memory_occupation", (_SGLANG,), "`tags`", remark=_SUCCESS),
    PeerRoute("pause_generation", (_SGLANG,), "`mode`: `abort`, `in_place`, `retract`", remark=_MODES),
    PeerRoute("continue_generation", (_SGLANG,), "`torch_empty_cache`", remark=_SUCCESS),
    PeerRoute("load_lora", (_VLLM,), "`lora_name`, `source`: `{uri}`", "`lora_name`, `lora_id`", "also on SGLang"),
    PeerRoute("unload_lora", (_VLLM,), "`lora_name`", "`lora_name`, `lora_id`", "also on SGLang"),
)

#: Why there is no such route, by its path.
REFUSED: Final = {route.path: route.refused for route in PEER_ROUTES if route.refused}
