"""`dynamo-worker check NAME`: import one engine or plugin, validate it, and report what is wrong with it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dynamo_worker.cli.commands import only_flags
from dynamo_worker.cli.output import print_error
from dynamo_worker.errors import UsageError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.plugins.facade import check

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = "dynamo-worker check NAME [--json]"


def main(argv: Sequence[str]) -> int:
    """Check one plugin; the exit code is 3 if it is unusable."""
    names = [word for word in argv if not word.startswith("-")]
    flags = only_flags([word for word in argv if word.startswith("-")], ("--json", "-h", "--help"), USAGE)
    if flags & {"-h", "--help"}:
        print(
            f"usage: {USAGE}\n\nImports the engine, the plugin or the module (in the current directory) with this name "
            "and checks its\nhooks, its flags and its API version. The exit code is 3 if it is unusable."
        )
        return 0
    if len(names) != 1:
        raise UsageError(f"check: expected one name, got {len(names)}", hint=f"usage: {USAGE}")
    records, errors = check(names[0])
    if "--json" in flags:
        print(json.dumps([{**asdict(record), "kind": record.kind} for record in records], indent=2))
    else:
        for record in records:
            if record.status == "ok":
                print(f"{record}: ok (hooks: {', '.join(record.hooks)})")
            for deprecation in record.deprecations:
                print(f"{record}: warning: {deprecation}")
        sys.stdout.flush()
        for error in errors:
            print_error(error)
    return ExitCode.START_FAILED if errors else 0
