#!/usr/bin/env python3
"""Prints the flags of Dynamo's own workers, as `tests/unit/data/peer_flags.json` has them.

Needs the directory of an `ai-dynamo` that is unpacked or installed with `--no-deps`, and no engine: the flags of the
engines are not among them. `python docs/peer_flags.py DIRECTORY` reads the sources; nothing of them runs.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any, Final

#: The modules that declare the flags of a worker, besides its own.
_SHARED: Final = ("runtime_args", "router_args", "kv_router_args", "frontend_decoding_args")
#: Flags that these modules declare for frontends only.
_OF_FRONTENDS: Final = ("--admission-control", "--enforce-disagg", "--router-min-initial-workers")
#: What only some workers call.
_ONLY_OF: Final = {"frontend_decoding_args": ("vllm", "sglang")}


def flags(path: Path) -> set[str]:
    """Return the flags that a module declares, with the forms that turn a switch off."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function not in ("add_argument", "add_negatable_bool_argument"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        names = [_text(argument) for argument in node.args] + [
            _text(given[key]) for key in ("flag_name", "obsolete_flag") if key in given
        ]
        own = {name for name in names if name.startswith("--")}
        if function == "add_negatable_bool_argument" or (
            "action" in given and ast.dump(given["action"]).count("BooleanOptionalAction")
        ):
            own |= {f"--no-{name[2:]}" for name in own}
        found |= own
    return found | _listed(tree)


def _listed(tree: ast.Module) -> set[str]:
    """Return the flags that a loop declares: a table of them has the flag and its variable first."""
    rows = [[_text(item) for item in node.elts] for node in ast.walk(tree) if isinstance(node, ast.Tuple)]
    return {row[0] for row in rows if len(row) > 1 and row[0].startswith("--") and row[1].startswith("DYN_")}


def _text(node: ast.expr) -> str:
    value: Any = node.value if isinstance(node, ast.Constant) else ""
    return value if isinstance(value, str) else ""


def main(directory: str) -> int:
    """Print the flags of all workers as JSON."""
    root = Path(directory) / "dynamo"
    groups = root / "common" / "configuration" / "groups"
    result = {}
    for engine in ("vllm", "sglang", "trtllm"):
        found = flags(root / engine / "backend_args.py")
        for name in _SHARED:
            if engine in _ONLY_OF.get(name, (engine,)):
                found |= flags(groups / f"{name}.py")
        result[engine] = sorted(found - set(_OF_FRONTENDS) - {f"--no-{name[2:]}" for name in _OF_FRONTENDS})
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
