"""The hooks of the vLLM engine."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker import EnginePlugin

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


class VllmPlugin(EnginePlugin):
    """Connects vLLM with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_vllm.engine:VllmEngine"
    headless_engine = "dynamo_worker_vllm.headless:HeadlessEngine"
    arguments = "dynamo_worker_vllm.arguments:add"
    claimed_flags = ("--config", "--log-level", "--reasoning-parser")
    flags_file = "--config"
    abbreviated_flags = True
    preload = "dynamo_worker_vllm.processes:preload_processes"
    # Otherwise vLLM reports the model, the hardware and its settings to its makers.
    environment: ClassVar[Mapping[str, str]] = MappingProxyType({"VLLM_NO_USAGE_STATS": "1"})

    conformance_waivers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "cleanup_closes_every_descriptor": "descriptors of ZMQ and pipes to processes that have ended: the plugin "
            "closes those that it knows",
        }
    )

    def is_headless(self, args: argparse.Namespace) -> bool:
        """Return whether this node only runs ranks of an engine that serves from another node."""
        return bool(args.headless)

    def engine_class(self, args: argparse.Namespace) -> str:
        """Return the class for models that generate, or for those that make embeddings."""
        if args.embedding_worker and not args.headless:
            return "dynamo_worker_vllm.embeddings:VllmEmbeddingEngine"
        return super().engine_class(args)


plugin = VllmPlugin()
