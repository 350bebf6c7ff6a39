#!/usr/bin/env python3
"""Reads what each engine serves from its sources, for docs/engines.md: no engine needs to be installed.

It shows in what an engine takes from the kit. A package can say what its sources do not show, in its
``pyproject.toml``: ``[tool.dynamo-worker.serves]`` has texts by the names of :data:`FEATURES`.
Run as a program, this prints the cells.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
GROUP: Final = "dynamo_worker.engines"
YES, NO = "yes", "–"  # noqa: RUF001 - a dash


class Sources(NamedTuple):
    """What the modules of one engine contain.

    :param kit: what they import from ``dynamo_worker.kit``: modules, and names as ``module.name``.
    :param defines: the names of methods and class attributes.
    :param texts: the string constants; of calls, keyword arguments that are strings as ``name=value``, and ``name=`` if
        it is that of an engine that makes embeddings.
    """

    kit: frozenset[str]
    defines: frozenset[str]
    texts: frozenset[str]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Sources:
        """Read modules."""
        nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        return cls(
            frozenset(name for node in nodes for name in _imported(node)),
            frozenset(name for node in nodes for name in _defined(node)),
            frozenset(text for node in nodes for text in _text(node)),
        )

    def uses(self, *names: str) -> bool:
        """Return whether they import one of these names from the kit."""
        return not self.kit.isdisjoint(names)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").removeprefix("dynamo_worker.")
        if module == "kit":
            yield from (alias.name for alias in node.names)
        elif module.startswith("kit."):
            yield module[4:]
            yield from (f"{module[4:]}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield f"{node.value.id}.{node.attr}"  # the use of a module of the kit, among others


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield item.name
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _text(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Call):
        if any(keyword.arg == _EMBEDDINGS for keyword in node.keywords):
            yield f"{_EMBEDDINGS}="  # what else it says is about them, such as that they are made of text
            return
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str):
                yield f"{keyword.arg}={keyword.value.value}"


def _when(condition: Callable[[Sources], bool]) -> Callable[[Sources], str]:
    return lambda sources: YES if condition(sources) else NO


def _in_requests(condition: Callable[[Sources], bool]) -> Callable[[Sources], str]:
    """Return the rule of a field of requests, which go to a server as they came if they go there as text."""
    return lambda sources: "the server's" if _TEXT in sources.texts else YES if condition(sources) else NO


_TEXT: Final = "model_input=text"
#: The field of ``EngineInfo`` of an engine that makes them.
_EMBEDDINGS: Final = "embeddings"
#: The rows: what an engine serves, and how its sources show it.
FEATURES: Final[dict[str, Callable[[Sources], str]]] = {
    "requests reach it as": lambda s: "text" if _TEXT in s.texts else "tokens",
    "log probabilities": _in_requests(
        lambda s: s.uses("chunks.add_logprobs", "chunks.top_logprob", "chunks.ChunkBuilder")
    ),
    "guided decoding": _in_requests(lambda s: s.uses("guided_decoding")),
    "embeddings": _when(lambda s: f"{_EMBEDDINGS}=" in s.texts),
    "LoRA adapters": _in_requests(lambda s: s.uses("lora")),
    "prefill and decode apart": _when(lambda s: s.uses("engine_arguments.disaggregation_mode")),
    "KV events for routers": _when(lambda s: s.uses("publishing.KvEvents", "kv_events.KvEventSource")),
    "load for routers": _when(lambda s: s.uses("publishing.LoadPublisher", "publishing.LoadPoller")),
    "forward-pass metrics for the planner": _when(lambda s: s.uses("forward_pass_metrics")),
    "metrics of its own": _when(lambda s: not s.defines.isdisjoint({"metrics_registry", "METRICS"})),
    "out of service and back": _when(lambda s: s.uses("engine_control.MemoryControl") or "paused" in s.defines),
    "new weights from trainers": _when(lambda s: s.uses("weights")),
    "several nodes": _when(lambda s: "headless_engine" in s.defines),
    "stall detection": _when(lambda s: "canary_request" in s.defines),
    "… that counts steps, as in a long prefill": _when(lambda s: "progress" in s.defines),
}
_VERSION: Final = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


class Engine(NamedTuple):
    """One engine.

    :param name: as in ``--engine NAME``.
    :param package: the distribution that has its plugin.
    :param extras: the extras that install it: its hardware.
    :param tested: the versions it is tested with.
    :param serves: the text of each row of :data:`FEATURES`.
    """

    name: str
    package: str
    extras: tuple[str, ...]
    tested: str
    serves: dict[str, str]


def engines() -> list[Engine]:
    """Return the core's engines, and then those of the packages in ``plugins/``, by name.

    :raises ValueError: a package declares a row that does not exist.
    """
    core, *plugins = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]
    return [engine for directory in (core, *plugins) for engine in _of_package(directory)]


def _of_package(directory: Path) -> Iterator[Engine]:
    content = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))
    project: dict[str, Any] = content["project"]
    own: dict[str, Any] = content.get("tool", {}).get("dynamo-worker", {})
    declared: dict[str, str] = own.get("serves", {})
    unknown = declared.keys() - FEATURES.keys()
    if unknown:
        raise ValueError(f"{directory.name}: [tool.dynamo-worker.serves] has unknown rows: {', '.join(unknown)}")
    extras = project.get("optional-dependencies", {}) if directory.parent.name == "plugins" else {}
    for name, reference in project["entry-points"][GROUP].items():
        module = directory / "src" / (reference.partition(":")[0].replace(".", "/") + ".py")
        # A package of its own is read as a whole; the core has engines in single modules.
        paths = sorted(module.parent.rglob("*.py")) if extras else [module]
        sources = Sources.read(paths)
        serves = {feature: declared.get(feature) or rule(sources) for feature, rule in FEATURES.items()}
        tested = own.get("tested-with") or _tested(directory, extras)
        yield Engine(name, project["name"], tuple(sorted(extras.keys() - {"test"})), tested, serves)


def _tested(directory: Path, extras: dict[str, list[str]]) -> str:
    """Return the pinned versions of what the extras install, for the first extra with any."""
    constraints = directory / "constraints.txt"
    pinned = dict(_VERSION.findall(constraints.read_text(encoding="utf-8"))) if constraints.exists() else {}
    for name in sorted(extras):
        wanted = [match[0] for match in (re.match(r"[\w.-]+", text) for text in extras[name]) if match]
        found = [f"{package} {pinned[package].partition('+')[0]}" for package in wanted if package in pinned]
        if found:
            standin = " (a stand-in)" if (directory / "tests" / "standin").exists() else ""
            return ", ".join(found) + standin
    return NO


def rows() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings and the rows of the table."""
    found = engines()
    facts = [
        ("package", *(f"`{engine.package}`" for engine in found)),
        ("extras", *(", ".join(f"`{extra}`" for extra in engine.extras) or "none" for engine in found)),
        ("tested with", *(engine.tested for engine in found)),
    ]
    table = [(feature, *(engine.serves[feature] for engine in found)) for feature in FEATURES]
    return ("", *(f"`{engine.name}`" for engine in found)), [*facts, *table]


if __name__ == "__main__":
    for row in rows()[1]:
        print(*row, sep="\t")
