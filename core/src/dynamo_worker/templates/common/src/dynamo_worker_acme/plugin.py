"""The hooks and the flags of the engine. Cheap to import: `dynamo-worker --help` imports it too, the engine not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin, hookimpl
from dynamo_worker.kit.engine_arguments import non_negative

if TYPE_CHECKING:
    import argparse


class AcmePlugin(EnginePlugin):
    """Connects the engine with the worker; `EnginePlugin` has the other hooks."""

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_acme.engine:AcmeEngine"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags."""
        group = parser.add_argument_group("acme engine")
        group.add_argument(
            "--served-model-name",
            default="acme",
            metavar="NAME",
            help="name clients ask for (default: acme)",
        )
        group.add_argument(
            "--tokens-per-second",
            type=non_negative,
            default=0.0,
            metavar="RATE",
            help="of the toy, for each request; 0 is as fast as possible (default: 0)",
        )


plugin = AcmePlugin()
