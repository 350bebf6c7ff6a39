"""The hooks of the reverse engine. Keep this module cheap to import: `--help` imports it too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_worker import EnginePlugin, hookimpl
from dynamo_worker.kit.engine_arguments import non_negative

if TYPE_CHECKING:
    import argparse


class ReversePlugin(EnginePlugin):
    """Connects the engine with the worker's lifecycle.

    The other hooks are inherited: `create_engine` imports the class below when the engine is really wanted, and
    `check_health`, `drain`, `cleanup` and so on call the methods of `EngineLifecycle` on it.
    """

    dynamo_worker_api = "1.2"
    engine = "dynamo_worker_reverse.engine:ReverseEngine"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's own flags."""
        group = parser.add_argument_group("reverse engine", "Answers every prompt backwards.")
        group.add_argument(
            "--served-model-name", default="reverse", metavar="NAME", help="name clients ask for (default: reverse)"
        )
        group.add_argument(
            "--tokens-per-second",
            type=non_negative,
            default=0.0,
            metavar="RATE",
            help="tokens per second of each request; 0 is as fast as possible (default: 0)",
        )
        group.add_argument(
            "--usage-file",
            type=lambda text: Path(text).absolute(),
            metavar="FILE",
            help="append one line for each request to this file (default: none)",
        )


plugin = ReversePlugin()
