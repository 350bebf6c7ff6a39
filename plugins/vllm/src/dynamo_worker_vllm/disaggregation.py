"""Disaggregated serving: what vLLM's KV connectors are told on the prefill and the decode worker."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from dynamo_worker import StartError
from dynamo_worker.kit import disaggregation
from dynamo_worker.kit.fields import section

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

#: Connectors whose workers find each other's blocks by content and exchange no parameters.
_BY_CONTENT = ("ExampleConnector", "LMCacheConnectorV1", "LMCacheMPConnector", "OffloadingConnector")
#: Connectors that combine others.
_COMPOSED = ("MultiConnector", "PdConnector")


class Role(disaggregation.Role):
    """The phase of each request that this worker runs."""

    def __init__(self, mode: str, config: VllmConfig) -> None:
        super().__init__(mode)
        self._config = config
        self._connector = _connector(config) if mode != "aggregated" else None

    def prepare_prefill(self, translated: SamplingParams) -> None:
        """Tell the connector, through the sampling parameters, where the KV cache goes to."""
        translated.max_tokens = translated.min_tokens = 1
        self._set(translated, self._prefill_params())

    def prepare_decode(self, translated: SamplingParams, handed_over: Mapping[str, Any]) -> None:
        """Tell the connector where the KV cache comes from, if it needs to know."""
        self._set(translated, section(handed_over, "kv_transfer_params"))

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


def _connector(config: VllmConfig) -> str:
    """Return the name of the connector that transfers the KV cache.

    :raises StartError: none is configured.
    """
    transfer = config.kv_transfer_config
    if transfer is None or not transfer.kv_connector:
        raise StartError(
            "--disaggregation-mode prefill and decode need a KV connector",
            hint='--kv-transfer-config \'{"kv_connector": "NixlConnector", "kv_role": "kv_both"}\'',
        )
    name: str = transfer.kv_connector
    if name in _COMPOSED:
        parts = [part["kv_connector"] for part in transfer.kv_connector_extra_config.get("connectors", ())]
        return next((part for part in parts if part not in _BY_CONTENT), parts[0] if parts else name)
    return name
