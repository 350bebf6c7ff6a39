#!/usr/bin/env python3
"""Reads what plugins may import from the code, and compares it with what the last release had.

``tests/unit/data/public_api.txt`` records the public API of the last release, one name with its signature a line. What
has changed since must be named in the changelog, which ``tests/unit/test_public_api.py`` checks. Without arguments this
prints the changes; ``--record`` writes the file anew, which is a step of a release.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import dynamo_worker
from dynamo_worker import hookspecs
from dynamo_worker.host.plugins.plugin_imports import PUBLIC_MODULES
from dynamo_worker.host.plugins.plugin_validation import hook_signatures

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
RECORD: Final = ROOT / "tests" / "unit" / "data" / "public_api.txt"
CHANGELOG: Final = ROOT / "CHANGELOG.md"

_PACKAGE: Final = Path(dynamo_worker.__file__).parent
#: Modules of the kit and the test kit that are not for other packages; a package covers its modules.
_INTERNAL: Final = (
    *("kit.media_addresses", "kit.media_budget", "kit.media_cache", "kit.media_decoder_main", "kit.media_decoders"),
    *("kit.media_downloads", "kit.media_files", "kit.media_http", "kit.media_threads", "kit.media_urls"),
    *("testing.checks", "testing.conformance_run", "testing.crash", "testing.lifecycle", "testing.limits"),
    *("testing.port_blocks", "testing.random_draws", "testing.resource_snapshot", "testing.sockets"),
    *("testing.source_locations", "testing.suite_engines"),
)
#: Members of classes that are public in spite of their underscore.
_SPECIAL: Final = ("__init__", "_HEALTH_CHECK")
_HEADER: Final = re.compile(r"# dynamo-worker (?P<release>\S+), API (?P<major>\d+)\.(?P<minor>\d+)")


class Recorded(NamedTuple):
    """The public API of a release.

    :param release: its version.
    :param api_version: its ``API_VERSION``.
    :param api: the signature of each public name, see :func:`current`.
    """

    release: str
    api_version: tuple[int, int]
    api: Mapping[str, str]


# --- Reading the code


def modules() -> dict[str, Path]:
    """Return the files of all public modules by module name, without the package's."""
    found = {}
    for public in PUBLIC_MODULES:
        path = _PACKAGE / public
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            parts = file.relative_to(_PACKAGE).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(f"{name}.".startswith(f"{internal}.") for internal in _INTERNAL):
                found[name] = file
    return found


def names(path: Path) -> dict[str, str]:
    """Return the signature of each public name of a module, members of classes as ``Class.member``."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return dict.fromkeys(sorted(ast.literal_eval(node.value)), "")
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for node in body:
        own = dict(_described(node))
        found |= {name: own[name] for name in own if not name.startswith("_") and name != "log"}
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id.startswith("_")]
            for member in (member for kind in (*bases, node) for member in kind.body):
                for name, signature in _described(member):
                    if name in _SPECIAL or not name.startswith(("_", "test_")):
                        found[f"{node.name}.{name}"] = signature
    return found


def _described(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield the names that a statement defines, with their signatures."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        word = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        if any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list):
            word = "property "
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield node.name, f"{word}({ast.unparse(node.args)}){returns}"
    elif isinstance(node, ast.ClassDef):
        bare = copy.copy(node)
        bare.body, bare.decorator_list = [ast.Pass()], []
        yield node.name, ast.unparse(bare).removesuffix("\n    pass").rstrip(":")
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        default = "" if node.value is None or ast.unparse(node.annotation).startswith("Final") else " = ..."
        yield node.target.id, f": {ast.unparse(node.annotation)}{default}"
    elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, ""


def current() -> dict[str, str]:
    """Return the signature of each public name now: ``hook:NAME``, ``dynamo_worker:NAME`` or ``MODULE:NAME``."""
    hooks = names(Path(hookspecs.__file__))
    api = {f"hook:{hook}": hooks[hook] for hook in hook_signatures()}
    api |= {f"dynamo_worker:{name}": "" for name in sorted(dynamo_worker.__all__)}
    for module, path in modules().items():
        api |= {f"dynamo_worker.{module}:{name}": signature for name, signature in names(path).items()}
    return api


# --- Comparing


def recorded(text: str) -> Recorded:
    """Return the API that a record holds."""
    header, *lines = text.splitlines()
    match = _HEADER.fullmatch(header)
    if match is None:
        raise SystemExit(f"{RECORD.name}: expected '# dynamo-worker VERSION, API MAJOR.MINOR', got {header!r}")
    api = dict(line.partition("\t")[::2] for line in lines)
    return Recorded(match["release"], (int(match["major"]), int(match["minor"])), api)


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return ``added``, ``removed`` or ``changed`` for each name that differs."""
    found = dict.fromkeys(before.keys() - now.keys(), "removed")
    for name, signature in now.items():
        if name not in before:
            found[name] = "added"
        elif before[name] != signature:
            found[name] = "changed"
    return dict(sorted(found.items()))


def problems(last: Recorded, now: Mapping[str, str], api_version: tuple[int, int], changelog: str) -> list[str]:
    """Return what is missing before a changed API may be released: a newer API version, names in the changelog.

    An entry that names a new module or class in backticks covers its names as well.

    :param changelog: its text; the sections above the one of the last release count.
    """
    found = changes(last.api, now)
    news = changelog.partition(f"\n## [{last.release}]")[0]
    mentioned = set(re.findall(r"[\w.]+\w", " ".join(re.findall(r"`([^`\n]+)`", news))))
    known = {part for name in last.api for part in _parts(name)}
    missing = []
    for name, what in found.items():
        covering = [part for part in _parts(name) if part == _parts(name)[-1] or part not in known]
        if not any(f".{part}".endswith(f".{mention}") for part in covering for mention in mentioned):
            missing.append(f"{what}: {covering[0]}; name it in CHANGELOG.md, above [{last.release}], in backticks")
    missing = list(dict.fromkeys(missing))
    if found and api_version <= last.api_version:
        missing.append(f"API_VERSION must be above {last.api_version}, got {api_version}")
    if "removed" in found.values() and api_version[0] <= last.api_version[0]:
        missing.append(f"names were removed: the major number of API_VERSION must be above {last.api_version[0]}")
    return missing


def _parts(name: str) -> list[str]:
    """Return the module, the class if there is one, and the full dotted name."""
    module, _, inner = name.partition(":")
    first = inner.partition(".")[0]
    inside = [f"{module}.{first}", f"{module}.{inner}"]
    return list(dict.fromkeys([module, *inside]))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the changes since the last release, or record the API for the next one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="record the API of the release that is being made")
    now = current()
    if parser.parse_args(argv).record:
        version = ".".join(map(str, hookspecs.API_VERSION))
        lines = [f"# dynamo-worker {dynamo_worker.__version__}, API {version}"]
        lines += [f"{name}\t{signature}".rstrip() for name, signature in now.items()]
        RECORD.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{RECORD.relative_to(ROOT)}: {len(now)} names recorded")
        return 0
    last = recorded(RECORD.read_text(encoding="utf-8"))
    for name, what in changes(last.api, now).items():
        print(f"{what}: {name} {now.get(name, '')}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
