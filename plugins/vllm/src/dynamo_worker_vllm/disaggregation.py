"""Disaggregated serving: what vLLM's KV connectors are told on the prefill and the decode worker."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from dynamo_worker import StartError
from dynamo_worker.kit import disaggregation
from dynamo_worker.kit.fields import section
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

log = get_logger(__name__)

#: Connectors whose workers find each other's blocks by content and exchange no parameters.
_BY_CONTENT = ("ExampleConnector", "LMCacheConnectorV1", "LMCacheMPConnector", "OffloadingConnector")
#: Connectors that combine others.
_COMPOSED = ("MultiConnector", "PdConnector")


class Role(disaggregation.Role):
    """The phase of each request that this worker runs."""

    def __init__(self, mode: str, config: VllmConfig) -> None:
        """Take the role.

        :raises StartError: it is prefill, and no connector transfers the KV cache.
        """
        super().__init__(mode)
        self._config = config
        self._connector = connector(config)
        if mode != "aggregated" and self._connector is None:
            role = "kv_producer" if mode == "prefill" else "kv_consumer"
            hint = f"""--kv-transfer-config '{{"kv_connector": "NixlConnector", "kv_role": "{role}"}}'"""
            if mode == "prefill":
                raise StartError("--disaggregation-mode prefill needs a KV connector", hint=hint)
            log.warning("The decode worker computes every prompt itself: it has no KV connector", next=hint)

    def prepare_prefill(self, translated: SamplingParams) -> None:
        """Tell the connector, through the sampling parameters, where the KV cache goes to."""
        translated.max_tokens = translated.min_tokens = 1
        self._set(translated, self._prefill_params())

    def prepare_decode(self, translated: SamplingParams, handed_over: Mapping[str, Any]) -> None:
        """Tell the connector where the KV cache comes from, if it needs to know."""
        if self._connector is not None:
            self._set(translated, section(handed_over, "kv_transfer_params"))

    @property
    def fetches(self) -> bool:
        """Whether the KV caches of requests come from another worker."""
        return self.mode == "decode" and self._connector is not None

    def hand_over(self, chunk: dict[str, Any], params: SamplingParams) -> None:
        """Add what the decode worker needs to a prefill worker's only chunk."""
        transfer = chunk.pop("kv_transfer_params", None)
        if self.mode != "prefill":
            return
        if self._connector == "MooncakeConnector" and params.extra_args:
            transfer = self._mooncake(params)
        # Without the object, even an empty one, the router takes the prefill for failed.
        chunk["disaggregated_params"] = {"kv_transfer_params": transfer or {}}

    def _prefill_params(self) -> dict[str, Any]:
        if self._connector in _BY_CONTENT:
            return {}
        params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        if self._connector == "MooncakeConnector":
            return {**params, "transfer_id": str(uuid.uuid4())}
        return {**params, "remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None}

    def _mooncake(self, params: SamplingParams) -> dict[str, Any]:
        from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
            get_mooncake_bootstrap_addr,
        )

        host, port = get_mooncake_bootstrap_addr(self._config)
        return {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": params.extra_args["kv_transfer_params"]["transfer_id"],
            "remote_bootstrap_addr": f"http://{host}:{port}",
            "remote_engine_id": self._config.kv_transfer_config.engine_id,
        }

    @staticmethod
    def _set(params: SamplingParams, transfer: Mapping[str, Any]) -> None:
        if transfer:
            params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": dict(transfer)}


def connectors(config: VllmConfig) -> list[str]:
    """Return the names of the connectors that transfer the KV cache; those of a connector that combines others."""
    transfer = config.kv_transfer_config
    if transfer is None or not transfer.kv_connector:
        return []
    name: str = transfer.kv_connector
    if name not in _COMPOSED:
        return [name]
    return [part["kv_connector"] for part in transfer.kv_connector_extra_config.get("connectors", ())] or [name]


def connector(config: VllmConfig) -> str | None:
    """Return the name of the connector that needs to know about each transfer, or else of any; None without one."""
    names = connectors(config)
    return next((name for name in names if name not in _BY_CONTENT), names[0] if names else None)
