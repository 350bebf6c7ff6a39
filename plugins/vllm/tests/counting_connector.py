"""A KV cache that plugs into vLLM's processes and has Prometheus metrics there, as LMCache has."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

CREATED = Counter("lmcache:toy_connectors", "Connectors created", ["role"])


class CountingConnector(ExampleConnector):
    """Counts itself."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        CREATED.labels(role.name).inc()
