"""`dynamo-worker engines`: what is installed, read from package metadata without importing any of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from dynamo_worker.cli.report import only_flags, print_table
from dynamo_worker.host.installed_plugins import discover
from dynamo_worker.host.options import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = "dynamo-worker engines [--json]"


def main(argv: Sequence[str]) -> int:
    """List all engines and plugins; a broken one is a row like the others."""
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
        print("nothing is installed; `pip install dynamo-worker-NAME` adds an engine")
        return 0
    print_table(
        ("NAME", "KIND", "PACKAGE", "VERSION", "STATUS", "ERROR"),
        [(r.name, r.kind, r.dist, r.version, r.status, r.error or "") for r in records],
    )
    return 0
