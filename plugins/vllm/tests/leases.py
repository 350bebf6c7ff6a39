"""A KV connector with leases, for vLLM's own interface: what a prefill leaves is held until it is fetched or expires.

It behaves as NIXL's does, but transfers nothing: the decode worker waits for a while, and then computes with what its
blocks happen to contain. As NIXL may, it ends the EngineCore if a request is aborted in mid-transfer.

vLLM's processes import this module (``kv_connector_module_path``).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)


@dataclass
class Transfers(KVConnectorMetadata):
    """What has changed since the last step.

    :ivar fetched: requests whose blocks are to be fetched, with the prefill worker's names of them.
    :ivar held: requests whose blocks are held, and when their leases expire (monotonic).
    """

    fetched: dict[str, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)


class LeaseConnector(KVConnectorBase_V1):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        option = self._kv_transfer_config.get_from_extra_config
        self._directory = Path(option("directory", ""))
        self._lease, self._seconds = option("lease", 30.0), option("seconds", 0.0)
        self._changes = Transfers()
        #: Of the scheduler: requests whose blocks are being fetched.
        self._waiting: set[str] = set()
        #: Of the worker: the prefill worker's name of each request being fetched, and when it is there.
        self._arriving: dict[str, tuple[str, float]] = {}
        self._held: dict[str, float] = {}
        if role is KVConnectorRole.SCHEDULER:
            names = ("PYTHONHASHSEED", "VLLM_NO_USAGE_STATS")
            seen = {"hash": hash("a block"), "parent": os.getppid(), **{name: os.environ.get(name) for name in names}}
            (self._directory / f"core-{os.getpid()}.json").write_text(json.dumps(seen))

    # ----------------------------------------------------------------------------------------------- in the EngineCore

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return max(0, len(request.prompt_token_ids) - num_computed_tokens), True
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill"):
            params["do_remote_prefill"] = False
            self._changes.fetched[request.request_id] = params["remote_request_id"]
            if num_external_tokens > 0:
                self._waiting.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        changes, self._changes = self._changes, Transfers()
        return changes

    def update_connector_output(self, connector_output: Any) -> None:
        self._waiting.difference_update(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if request.request_id in self._waiting:
            raise RuntimeError("aborted in mid-transfer")
        if not (request.kv_transfer_params or {}).get("do_remote_decode") or not block_ids:
            return False, None
        self._changes.held[request.request_id] = time.monotonic() + self._lease
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_request_id": request.request_id,
            "remote_block_ids": block_ids,
        }

    # --------------------------------------------------------------------------------------------------- in the worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        changes = self._get_connector_metadata()
        assert isinstance(changes, Transfers)
        self._held |= changes.held
        there = time.monotonic() + self._seconds
        self._arriving |= {name: (remote, there) for name, remote in changes.fetched.items()}

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        now = time.monotonic()
        received = {name for name, (_, there) in self._arriving.items() if there <= now}
        for name in received:
            remote, _ = self._arriving.pop(name)
            (self._directory / f"{remote}.fetched").touch()
        sent = {name for name in self._held if (self._directory / f"{name}.fetched").exists()}
        for name in {name for name, expires in self._held.items() if expires <= now} - sent:
            print(f"Releasing expired blocks of {name}", flush=True)
            sent.add(name)
        for name in sent:
            del self._held[name]
        return sent, received

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
