"""The plugin of an engine with one bug of choice: what the conformance kit must find in the engines of others.

It is found like any installed plugin: this directory, with its dist-info, is put on PYTHONPATH. ``BUGGY_BUG`` in the
environment chooses the bug; without it the engine has none. It builds on what an author of a plugin has.
"""

from __future__ import annotations

import argparse
import os
import time

from dynamo_worker import EngineContext, EnginePlugin, hookimpl

BUG = os.environ.get("BUGGY_BUG", "")

if BUG == "help-imports-the-engine":
    import buggy_engine  # noqa: F401


class BuggyPlugin(EnginePlugin):
    dynamo_worker_api = "0.9" if BUG == "wrong-api-version" else "1.2"
    engine = {
        "text": "buggy_text:BuggyTextEngine",
        "embedding": "buggy_embedding:BuggyEmbeddingEngine",
    }.get(BUG.partition("-")[0], "buggy_engine:BuggyEngine")

    @hookimpl
    def prepare(self, arguments: list[str]) -> None:
        if BUG == "prepare-blocks":
            time.sleep(1.5)

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("buggy engine")
        group.add_argument("--served-model-name", default="buggy", help="name that clients ask for")
        group.add_argument(
            "--step-seconds",
            type=float,
            default=0.001,
            help="duration of a step; 100% of it is waiting" if BUG == "help-cannot-be-shown" else "duration of a step",
        )
        if BUG == "flag-collides":
            group.add_argument("--namespace", default="mine", help="a name that the worker has taken")

    if BUG == "async-create-engine":

        @hookimpl
        async def create_engine(self, args: argparse.Namespace, context: EngineContext):
            return None


plugin = BuggyPlugin()
