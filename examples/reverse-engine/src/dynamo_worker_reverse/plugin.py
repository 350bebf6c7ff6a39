"""The hooks of the reverse engine. Importing this module must stay cheap: `--help` does it too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_worker import hookimpl

if TYPE_CHECKING:
    from dynamo_worker import Deadline, EngineContext
    from dynamo_worker_reverse.engine import ReverseEngine


class ReversePlugin:
    """Connects the engine with the worker's lifecycle; each hook names only the arguments it needs."""

    dynamo_worker_api = "1.1"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's own flags."""
        group = parser.add_argument_group("reverse engine", "Answers every prompt backwards.")
        group.add_argument(
            "--served-model-name", default="reverse", metavar="NAME", help="name clients ask for (default: reverse)"
        )
        group.add_argument(
            "--tokens-per-second",
            type=_not_negative,
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

    @hookimpl
    def create_engine(self, args: argparse.Namespace, context: EngineContext) -> ReverseEngine:
        """Return the engine; `Engine.start` starts it."""
        # Imported only when the engine is really wanted. With a big engine this is the import that takes seconds.
        from dynamo_worker_reverse.engine import ReverseEngine

        return ReverseEngine(args, context)

    @hookimpl
    async def check_health(self, engine: ReverseEngine) -> None:
        """Ask the core whether it listens."""
        await engine.check()

    @hookimpl
    async def drain(self, engine: ReverseEngine) -> None:
        """Write the usage records: work that no request in flight shows."""
        await engine.flush()

    @hookimpl
    async def cleanup(self, engine: ReverseEngine, deadline: Deadline) -> None:
        """End the core process."""
        await engine.shutdown(deadline)


def _not_negative(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


plugin = ReversePlugin()
