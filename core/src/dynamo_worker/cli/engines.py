"""`dynamo-worker engines`: list installed engines and plugins from package metadata, without importing them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from dynamo_worker.cli.commands import only_flags
from dynamo_worker.cli.output import print_table
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.plugins.installed_plugins import discover

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = "dynamo-worker engines [--json]"


def main(argv: Sequence[str]) -> int:
    """List all engines and plugins, including broken ones."""
    flags = only_flags(argv, ("--json", "-h", "--help"), USAGE)
    if flags & {"-h", "--help"}:
        print(f"usage: {USAGE}\n\nLists the installed engines and plugins without importing them.")
        return 0
    allowed, disabled = (
        os.environ.get(BY_NAME[name].env, "").replace(",", " ").split() for name in ("installed_plugins", "no_plugin")
    )
    records = discover(disabled, allowed or ("all",))
    if "--json" in flags:
        print(json.dumps([{**asdict(record), "kind": record.kind} for record in records], indent=2))
        return 0
    if not records:
        print("no engine or plugin is installed; to add an engine: pip install dynamo-worker-NAME")
        return 0
    print_table(
        ("NAME", "KIND", "PACKAGE", "VERSION", "STATUS", "ERROR"),
        [(r.name, r.kind, r.dist, r.version, r.status, r.error or "") for r in records],
    )
    return 0
