"""Writes a new package from a template, whole or not at all.

The templates are packages themselves, for an engine called `acme`: their names are replaced, nothing else.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import dynamo_worker
from dynamo_worker.errors import UsageError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.cli.plugin_names import PluginNames

_PACKAGE: Final = Path(dynamo_worker.__file__).parent
_TEMPLATES: Final = _PACKAGE / "templates"
#: The toy's `config.json` and tokenizer are those of the echo engine.
_MODEL: Final = _PACKAGE / "engines" / "echo_model"
_MODEL_PLACE: Final = Path("src/dynamo_worker_acme/model")
#: What tools leave beside sources.
_CACHES: Final = frozenset({"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
#: What may already be in the package's directory.
_HARMLESS: Final = frozenset({".git"})


@dataclass(frozen=True)
class Template:
    """One kind of engine.

    :param summary: what it is for.
    :param layers: directories of `templates/` whose files it consists of; a later one replaces files of an earlier one.
    :param takes_tokens: whether frontends need the toy's `config.json` and tokenizer.
    """

    summary: str
    layers: tuple[str, ...]
    takes_tokens: bool = True

    def files(self) -> Iterator[tuple[Path, str]]:
        """Yield each file: its path in the package, and its text."""
        roots = [(_TEMPLATES / layer, Path()) for layer in self.layers]
        if self.takes_tokens:
            roots.append((_MODEL, _MODEL_PLACE))
        for root, place in roots:
            for path in sorted(root.rglob("*")):
                if path.is_file() and _CACHES.isdisjoint(path.parts):
                    yield place / path.relative_to(root), path.read_text(encoding="utf-8")


#: The first one is the default.
TEMPLATES: Final = {
    "process": Template(
        "the engine is a library: it works in a process of its own, where it may block and crash",
        ("common", "steps", "process"),
    ),
    "thread": Template(
        "the engine is a library that releases the GIL: it works in a thread of the worker",
        ("common", "steps", "thread"),
    ),
    "server": Template(
        "the engine is an OpenAI-compatible server: the worker starts it and passes requests on",
        ("common", "server"),
        takes_tokens=False,
    ),
}


def write(template: Template, names: PluginNames, directory: Path) -> list[Path]:
    """Write a package and return the paths of its files, relative to it.

    :param directory: must not exist, or be empty but for a ``.git``.
    :raises UsageError: there is something that would be overwritten.
    :raises WorkerError: it cannot be written; nothing is left.
    """
    files = {Path(names.put_into(str(path))): names.put_into(text) for path, text in template.files()}
    try:
        found = sorted(set(os.listdir(directory)) - _HARMLESS)
    except FileNotFoundError:
        found = []
    except NotADirectoryError:
        raise UsageError(f"{directory} is a file", hint="choose another place with --directory") from None
    except OSError as error:
        raise WorkerError(f"cannot write {directory}: {error.strerror}") from error
    if found:
        raise UsageError(
            f"{directory} exists and is not empty: it has {found[0]}; nothing is ever overwritten",
            hint="choose another place with --directory",
        )
    with _undone_on_failure() as made:
        try:
            for path, text in files.items():
                _make_directories((directory / path).parent, made)
                with open(directory / path, "x", encoding="utf-8") as file:
                    made.append(directory / path)
                    file.write(text)
        except OSError as error:
            raise WorkerError(f"cannot write {directory}: {error.strerror}") from error
    return sorted(files)


def _make_directories(path: Path, made: list[Path]) -> None:
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        made.append(parent)


@contextlib.contextmanager
def _undone_on_failure() -> Iterator[list[Path]]:
    """Yield a list of what is made: it is removed again if the block fails."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
