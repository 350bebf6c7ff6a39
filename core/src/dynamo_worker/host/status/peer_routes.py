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

#: Marks the routes that trainers use, which have a section of their own in the documentation.
TRAINING: Final = "see New weights"


def _training(worker: str, *rows: tuple[str, str, str]) -> list[PeerRoute]:
    return [PeerRoute(path, (worker,), body, answer, TRAINING) for path, body, answer in rows]


_GROUP: Final = "the group's address, and its members"
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
    PeerRoute(
        "control/release_memory_occupation", (_TRTLLM,), "`tags`, `timeout_s`", remark="`timeout_s` is 120 by default"
    ),
    PeerRoute("control/resume_memory_occupation", (_TRTLLM,), "`tags`"),
    PeerRoute("release_memory_occupation", (_SGLANG,), "`tags`", remark=_MODES),
    PeerRoute("resume_memory_occupation", (_SGLANG,), "`tags`", remark=_SUCCESS),
    PeerRoute("pause_generation", (_SGLANG,), "`mode`: `abort`, `in_place`, `retract`", remark=_MODES),
    PeerRoute("continue_generation", (_SGLANG,), "`torch_empty_cache`", remark=_SUCCESS),
    PeerRoute("load_lora", (_VLLM,), "`lora_name`, `source`: `{uri}`", "`lora_name`, `lora_id`", "also on SGLang"),
    PeerRoute("unload_lora", (_VLLM,), "`lora_name`", "`lora_name`, `lora_id`", "also on SGLang"),
    *_training(
        _VLLM,
        ("liveness_probe", "", "`alive`"),
        ("pause_generation", "`mode`: `keep`, `wait`, `abort`; `clear_cache`", "`mode`, `clear_cache`"),
        ("resume_generation", "", ""),
        ("flush_cache", "", ""),
        ("abort_request", "`request_id`", "`request_id`"),
        ("update_weights_from_disk", "`model_path`, `weight_version`, `engine_rpc`", "`version`, `version_declared`"),
        ("update_weights_from_distributed", "`engine_rpc` and its arguments", "`version`, `version_declared`"),
        ("init_weights_update_group", _GROUP, ""),
        ("destroy_weights_update_group", "`engine_rpc` and its arguments", ""),
        ("get_weight_version", "", "`version`, `version_declared`"),
        ("set_weight_version", "`weight_version`", "`version`"),
        ("update_weights_from_tensor", "", "an error, as there"),
    ),
    *_training(
        _SGLANG,
        ("control/update_weights_from_disk", "SGLang's fields", "`success`, `num_paused_requests`"),
        ("control/update_weights_from_tensor", "SGLang's fields", "`success`"),
        ("control/update_weights_from_distributed", "SGLang's fields", "`success`"),
        ("control/update_weights_from_ipc", "SGLang's fields", "`success`"),
        ("control/update_weight_version", "`new_version`, `abort_all_requests`", "`success`, `new_version`"),
    ),
)

#: Why there is no such route, by its path.
REFUSED: Final = {route.path: route.refused for route in PEER_ROUTES if route.refused}
