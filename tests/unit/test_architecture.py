"""Which part of the code may know which: the directions that docs/design.md draws, read from the imports themselves."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker.host.plugins.plugin_imports import PUBLIC_MODULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "core" / "src" / "dynamo_worker"
#: What `dynamo-worker new` writes packages from: no part of the core, but what somebody outside of it has.
TEMPLATES = PACKAGE / "templates"


def modules(source: Path) -> dict[str, Path]:
    """Return the modules below a source directory by their names."""
    found = {}
    for path in source.rglob("*.py"):
        if TEMPLATES in path.parents and TEMPLATES not in source.parents:
            continue
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


CORE = modules(PACKAGE.parent)
#: The plugins, the example and the templates, by their paths: whoever builds on the core from outside.
PLUGINS = {
    str(path.relative_to(ROOT)): path
    for source in [*ROOT.glob("plugins/*/src"), *ROOT.glob("examples/*/src"), *TEMPLATES.glob("*/src")]
    for path in modules(source).values()
}


def imports(path: Path) -> Iterator[str]:
    """Return what a module imports anywhere, for type checkers too: a submodule by its own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in CORE else node.module or ""


GRAPH = {name: set(imports(path)) & CORE.keys() - {name} for name, path in CORE.items()}


def below(name: str, *parts: str) -> bool:
    """Return whether a module is one of these parts of the core, or in one of them."""
    return any(f"{name}.".startswith(f"dynamo_worker.{part}.") for part in parts)


#: What everybody may build on: no part of the host, the kit, an engine or the command line.
SHARED = ("address", "allowed_paths", "containment", "deadline", "deprecation", "embeddings", "engine", "errors")
SHARED += ("exit_codes", "hookspecs", "lifecycle", "logs", "requests", "responses", "suggest", "text")


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_plugins_build_on_the_kit_and_the_public_names_only(name: str) -> None:
    imported = {other for other in imports(PLUGINS[name]) if other.split(".")[0] == "dynamo_worker"}
    assert {other for other in imported if other != "dynamo_worker" and not below(other, *PUBLIC_MODULES)} == set()


def test_engines_of_the_core_build_on_what_plugins_have() -> None:
    for name in GRAPH:
        if below(name, "engines"):
            assert {other for other in GRAPH[name] if not below(other, "engines", *PUBLIC_MODULES, "__init__")} <= {
                "dynamo_worker"
            }, name


#: For each part, all that it may know beside itself.
DIRECTIONS = {
    "supervisor": ("lifecycle", "exit_codes"),
    "kit": (*SHARED, "supervisor"),
    "host": (*SHARED, "supervisor"),
    "cli": (*SHARED, "supervisor", "host"),
}


@pytest.mark.parametrize("part", sorted(DIRECTIONS))
def test_directions(part: str) -> None:
    allowed = (part, *DIRECTIONS[part])
    for name in GRAPH:
        if below(name, part):
            assert {other for other in GRAPH[name] if not below(other, *allowed)} <= {"dynamo_worker"}, name


def test_what_everybody_builds_on_builds_on_nothing_above_it() -> None:
    for name in GRAPH:
        if below(name, *SHARED):
            assert {other for other in GRAPH[name] if not below(other, *SHARED, "supervisor")} <= {"dynamo_worker"}, (
                name
            )


def test_every_module_has_a_place() -> None:
    roots = {name.split(".")[1] for name in GRAPH if "." in name}
    assert roots == {*SHARED, "supervisor", "kit", "host", "cli", "engines", "testing", "__main__"}


def test_the_supervisor_needs_the_standard_library_only() -> None:
    for name, path in CORE.items():
        if below(name, "supervisor", "lifecycle", "exit_codes"):
            top = {other.split(".")[0] for other in imports(path)}
            assert top <= {*sys.stdlib_module_names, "dynamo_worker"}, name


def test_no_circles() -> None:
    """Not even of names that only a type checker follows: who reads one module has to read the other, too."""
    graph = {name: others - {"dynamo_worker"} for name, others in GRAPH.items() if name != "dynamo_worker"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(CORE))
def test_units_of_a_readable_size(name: str) -> None:
    source = CORE[name].read_text()
    assert len(source.splitlines()) <= 450, "lines of a module"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 350, f"lines of the class {node.name}"
