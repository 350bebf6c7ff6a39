#!/usr/bin/env python3
"""Regenerates the parts of the documentation that are derived from the code.

They are between ``<!-- generated:NAME -->`` and ``<!-- /generated -->``. With ``--check`` nothing is written: stale
parts are listed, and the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dashboard
import engine_table
import public_api
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

import dynamo_worker
from dynamo_worker import embeddings, engine, errors, hookspecs, lifecycle, requests, responses
from dynamo_worker import text as text_types
from dynamo_worker.cli import help as cli_help
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config import options, peer_flags
from dynamo_worker.host.plugins.plugin_validation import hook_signatures
from dynamo_worker.host.requests.serving import RequestRegistry
from dynamo_worker.host.status.metrics import WorkerMetrics
from dynamo_worker.host.status.peer_routes import PEER_ROUTES
from dynamo_worker.kit import request_limits as limits

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_MARKED: Final = re.compile(
    r"(?P<head><!-- generated:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<tail><!-- /generated -->)", re.DOTALL
)
#: Columns of the help text in the documentation.
_WIDTH: Final = 110


# --- Reading the code


def comments(kind: type[enum.Enum]) -> dict[str, str]:
    """Return the ``#:`` comment of every member of an enumeration, by member name."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in map(str.strip, inspect.getsource(kind).splitlines()):
        if line.startswith("#:"):
            lines.append(line[2:].strip())
        elif lines and (match := re.match(r"(\w+)\s*=", line)):
            found[match[1]] = " ".join(lines)
            lines = []
        else:
            lines = []
    return found


def signature(function: Any) -> str:
    """Return the signature of a function as its author wrote it, on one line."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}"


def text(thing: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the docstring of a thing as Markdown: its paragraphs, and its fields (``param x``, text)."""
    paragraphs: list[str] = []
    fields: list[tuple[str, str]] = []
    for block in (inspect.getdoc(thing) or "").split("\n\n"):
        if not block.lstrip().startswith(":"):
            paragraphs.append(_markdown(block))
            continue
        for entry in re.split(r"\n(?=:)", block):
            match = re.match(r":(?:param )?(\w+(?: \w+)?):\s*(.*)", entry, re.DOTALL)
            assert match, entry
            fields.append((match[1], _markdown(match[2])))
    return paragraphs, fields


def _markdown(reference_text: str) -> str:
    """Turn reStructuredText into Markdown on one line."""
    line = " ".join(reference_text.split())
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line)
    return line.replace("``", "`")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _described(thing: Any) -> str:
    """Return paragraphs and fields of a docstring."""
    paragraphs, fields = text(thing)
    lines = ["\n\n".join(paragraphs)]
    if fields:
        lines.append("")
    for name, meaning in fields:
        word, _, error = name.partition(" ")
        lines.append(f"- raises `{error}`: {meaning}" if word == "raises" else f"- `{name}`: {meaning}")
    return "\n".join(lines)


# --- The generated parts


def settings() -> str:
    """Return the table of all settings."""
    return options.markdown_table().strip()


def peers() -> str:
    """Return the tables of the flags of Dynamo's own workers."""
    return peer_flags.markdown_table()


def help_text() -> str:
    """Return what ``dynamo-worker --help`` prints, without the engines that happen to be installed here."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_WIDTH)
    try:
        printed = cli_help.render(None)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    printed = re.sub(r"\nInstalled engines:\n.*?\n\n", "\n", printed, flags=re.DOTALL)
    return "\n".join(["```text", *(line.rstrip() for line in printed.splitlines()), "```"])


def exit_codes() -> str:
    """Return the table of the exit codes."""
    meanings = comments(ExitCode)
    rows = [(f"`{code.value}`", f"`{code.name}`", _markdown(meanings[code.name])) for code in ExitCode]
    last = "Killed by signal *n* (137: SIGKILL), or ended by a second or third signal *n* (143: SIGTERM, 130: SIGINT)."
    return _table(("code", "name", "meaning"), [*rows, ("`128+n`", "", last)])


def hooks() -> str:
    """Return every hook with its signature and its documentation, in lifecycle order."""
    parts = []
    for name in hook_signatures():
        function = getattr(hookspecs, name)
        parts += [f"### `{name}`", "", "```python", signature(function), "```", "", _described(function), ""]
    return "\n".join(parts).strip()


def protocol() -> str:
    """Return the engine protocol and the optional capabilities, method by method."""
    kinds = [
        kind
        for kind in vars(engine).values()
        if inspect.isclass(kind) and kind.__module__ == engine.__name__ and getattr(kind, "_is_protocol", False)
    ]
    parts = []
    for kind in sorted(kinds, key=lambda kind: (kind is not engine.Engine, kind is not engine.RequestContext)):
        parts += [f"### `{kind.__name__}`", "", _described(kind), ""]
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                parts += ["```python", signature(method), "```", "", _described(method), ""]
    return "\n".join(parts).strip()


def engine_info() -> str:
    """Return the tables of what an engine says about itself."""
    parts = []
    for kind in (engine.EngineInfo, embeddings.EmbeddingSpec, engine.EndpointSpec, engine.EngineContext):
        paragraphs, fields = text(kind)
        parts += [f"### `{kind.__name__}`", "", *paragraphs, ""]
        parts += [_table(("field", "meaning"), [(f"`{name}`", meaning) for name, meaning in fields]), ""]
    return "\n".join(parts).strip()


def error_types() -> str:
    """Return the table of the errors that plugins raise or see."""
    rows = []
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__:
            code = getattr(kind, "exit_code", None)
            rows.append((f"`{kind.__name__}`", "none" if code is None else f"{int(code)}", text(kind)[0][0]))
    return _table(("error", "exit code", "meaning"), rows)


def request_limits() -> str:
    """Return the table of what a request can make long, and how long."""
    rows = [(limit.parts, f"{limit.most:,} {limit.unit}".replace(",", " ")) for limit in limits.ALL]
    return _table(("part of a request", "at most"), rows)


def engines() -> str:
    """Return the table of all engines, with what each serves."""
    headings, rows = engine_table.rows()
    return _table(headings, rows)


def states() -> str:
    """Return the table of the states."""
    meanings = comments(lifecycle.State)
    return _table(("state", "what happens"), [(f"`{s.value}`", _markdown(meanings[s.name])) for s in lifecycle.State])


def transitions() -> str:
    """Return every transition that changes the state."""
    meanings = comments(lifecycle.Event)
    rows = [
        (f"`{state.value}`", f"`{event.value}`", f"`{target.value}`", _markdown(meanings[event.name]))
        for (state, event), target in lifecycle.TRANSITIONS.items()
        if state is not target
    ]
    return _table(("from", "event", "to", "the event means"), rows)


def metrics() -> str:
    """Return the table of the worker's own metrics."""
    return _table(("metric", "type", "labels", "meaning"), _metrics())


def grafana() -> str:
    """Return the dashboard of the worker's own metrics."""
    return dashboard.dashboard({name.strip("`"): kind for name, kind, _, _ in _metrics()})


def _metrics() -> list[tuple[str, str, str, str]]:
    """Return the worker's own metrics: name, type, labels and meaning."""
    worker_metrics = WorkerMetrics(RequestRegistry())
    labels: dict[str, tuple[str, ...]] = {}
    for metric in vars(worker_metrics).values():
        if isinstance(metric, MetricWrapperBase):
            labels[metric._name] = metric._labelnames  # noqa: SLF001 - the library tells nobody otherwise
    rows = []
    for family in text_string_to_metric_families(worker_metrics.exposition()):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        own = labels.get(family.name) or tuple({key: None for sample in family.samples for key in sample.labels})
        shown = ", ".join(f"`{label}`" for label in own if label != "le")
        rows.append((f"`{name}`", family.type, shown, f"{family.documentation}."))
    return rows


def peer_routes() -> str:
    """Return the table of the control routes of Dynamo's own workers."""
    rows = []
    for route in PEER_ROUTES:
        here = f"refused: {route.refused}" if route.refused else route.remark or "the same"
        rows.append((f"`/engine/{route.path}`", ", ".join(route.workers), route.body or "`{}`", route.answer, here))
    return _table(("route of Dynamo's workers", "workers", "body", "answer", "here"), rows)


def public_names() -> str:
    """Return the table of what plugins may import: each public module with its names."""
    package = ", ".join(f"`{name}`" for name in sorted(dynamo_worker.__all__))
    rows = [("`dynamo_worker`", package)]
    for module, path in public_api.modules().items():
        own = [name for name in public_api.names(path) if "." not in name]
        if own:
            rows.append((f"`dynamo_worker.{module}`", ", ".join(f"`{name}`" for name in own)))
    return _table(("module", "names"), rows)


def request_types() -> str:
    """Return the tables of all parts of a request."""
    return _typed_dicts(requests, requests.Request)


def chunk_types() -> str:
    """Return the tables of all parts of a chunk."""
    return _typed_dicts(responses, responses.Chunk)


def text_request_types() -> str:
    """Return the tables of all parts of a text engine's requests and chunks."""
    return _typed_dicts(text_types, text_types.TextRequest)


def embedding_types() -> str:
    """Return the tables of an embedding engine's requests and answers."""
    return _typed_dicts(embeddings, embeddings.EmbeddingRequest)


def _typed_dicts(module: ModuleType, first: Any) -> str:
    """Return one table of fields for each ``TypedDict`` of a module, the outermost one first."""
    kinds = [
        kind
        for name, kind in vars(module).items()
        if not name.startswith("_") and typing.is_typeddict(kind) and kind.__module__ == module.__name__
    ]
    parts = []
    for kind in sorted(kinds, key=lambda kind: kind is not first):
        paragraphs, fields = text(kind)
        annotations: dict[str, str] = {}
        annotations |= {name: hint.__forward_arg__ for name, hint in kind.__annotations__.items()}
        assert set(annotations) == {name for name, _ in fields}, f"{kind.__name__}: fields without documentation"
        rows = [(f"`{name}`", f"`{_without_none(annotations[name])}`", meaning) for name, meaning in fields]
        parts += [f"### `{kind.__name__}`", "", *paragraphs, "", _table(("field", "type", "meaning"), rows), ""]
    return "\n".join(parts).strip()


def _without_none(annotation: str) -> str:
    return annotation.removesuffix(" | None")


PARTS: Final[dict[str, Callable[[], str]]] = {
    "settings": settings,
    "peer-flags": peers,
    "help": help_text,
    "exit-codes": exit_codes,
    "hooks": hooks,
    "protocol": protocol,
    "engine-info": engine_info,
    "errors": error_types,
    "request-limits": request_limits,
    "engines": engines,
    "states": states,
    "transitions": transitions,
    "metrics": metrics,
    "peer-routes": peer_routes,
    "public-api": public_names,
    "request": request_types,
    "text": text_request_types,
    "embeddings": embedding_types,
    "chunk": chunk_types,
}


#: Files that are generated as a whole.
FILES: Final[dict[Path, Callable[[], str]]] = {ROOT / "deploy" / "monitoring" / "dashboard.json": grafana}


# --- Writing the documentation


def regenerated(page: str, source: str = "") -> str:
    """Return a page with all its generated parts regenerated.

    :param source: name of the page, for the message.
    :raises SystemExit: it names a part that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        part = PARTS.get(match["name"])
        if part is None:
            raise SystemExit(f"{source}: there is no generated part {match['name']!r}; known: {', '.join(PARTS)}")
        return f"{match['head']}{part()}\n{match['tail']}"

    return _MARKED.sub(replace, page)


def stale(path: Path) -> list[str]:
    """Return the names of the stale parts of one page."""
    page = path.read_text(encoding="utf-8")
    now = regenerated(page, path.name)
    old, new = ({m["name"]: m["body"] for m in _MARKED.finditer(version)} for version in (page, now))
    return [name for name in new if old.get(name) != new[name]]


def main(argv: Sequence[str] | None = None) -> int:
    """Regenerate everything, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")
    check = parser.parse_args(argv).check
    found = 0
    for path in PAGES:
        for name in stale(path):
            found += 1
            print(f"{path.relative_to(ROOT)}: {name} {'is stale' if check else 'regenerated'}")
        if not check:
            page = path.read_text(encoding="utf-8")
            new = regenerated(page, path.name)
            if new != page:
                path.write_text(new, encoding="utf-8")
    for path, content in FILES.items():
        now = content()
        if not path.exists() or path.read_text(encoding="utf-8") != now:
            found += 1
            print(f"{path.relative_to(ROOT)}: {'is stale' if check else 'regenerated'}")
            if not check:
                path.write_text(now, encoding="utf-8")
    if check and found:
        print("run: python docs/generate.py")
        return 1
    if not found:
        print("everything is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
