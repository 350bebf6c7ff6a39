"""The hooks of the SGLang engine."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from dynamo_worker import EnginePlugin

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


class SglangPlugin(EnginePlugin):
    """Connects SGLang with the worker's lifecycle."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_sglang.engine:SglangEngine"
    headless_engine = "dynamo_worker_sglang.nodes:Follower"
    arguments = "dynamo_worker_sglang.arguments:add"
    claimed_flags = ("--config", "--log-level", "--reasoning-parser", "--tool-call-parser")
    flags_file = "--config"
    abbreviated_flags = True
    preload = "dynamo_worker_sglang.processes:preload_processes"
    conformance_waivers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "signal_handlers_are_left_alone": "a process of SGLang that fails sends SIGQUIT to the worker, which would "
            "end it: the plugin handles it and fails the engine",
        }
    )

    def is_headless(self, args: argparse.Namespace) -> bool:
        """Return whether this node follows the first one, which serves."""
        return bool(args.node_rank > 0)

    def engine_class(self, args: argparse.Namespace) -> str:
        """Return the class for models that generate, or for those that make embeddings."""
        if (args.embedding_worker or args.is_embedding) and not self.is_headless(args):
            return "dynamo_worker_sglang.embeddings:SglangEmbeddingEngine"
        return super().engine_class(args)


plugin = SglangPlugin()
