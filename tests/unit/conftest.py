"""Shared by the unit tests: installing plugins for the duration of one test, and running the command line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: A complete engine plugin as a module.
ENGINE_MODULE = """
    from dynamo_worker.hookspecs import hookimpl

    @hookimpl
    def add_arguments(parser):
        group = parser.add_argument_group("toy")
        group.add_argument("--size", type=int, default=1)
        group.add_argument("--fast", action="store_true")
        group.add_argument("--layers", nargs="+", default=[])
        group.add_argument("--options", default=None)
        group.add_argument("-pp", "--pipeline-size", type=int, default=1)

    @hookimpl
    def create_engine(args, context):
        return ("engine", args, context)
    """


class Site:
    """A directory on the Python path in which a test installs packages: modules and their metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def module(self, name: str, source: str) -> None:
        """Write one module."""
        (self.path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def install(
        self,
        dist: str,
        version: str = "1.0",
        *,
        engines: Mapping[str, str] | None = None,
        plugins: Mapping[str, str] | None = None,
        extras: Sequence[str] = (),
    ) -> None:
        """Write the metadata of one distribution."""
        info = self.path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {dist}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        entries = []
        for group, points in (("engines", engines or {}), ("plugins", plugins or {})):
            entries.append(f"[dynamo_worker.{group}]")
            entries += [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(entries) + "\n")
        importlib.invalidate_caches()

    def install_engine(self, name: str = "toy", source: str = ENGINE_MODULE, dist: str = "toy-dist") -> None:
        """Install one engine whose plugin is the module ``NAME_plugin``."""
        self.module(f"{name}_plugin", source)
        self.install(dist, engines={name: f"{name}_plugin"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Install packages for one test."""
    path = tmp_path / "site"
    path.mkdir()
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(path))
    yield Site(path)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


class CommandLine:
    """Runs `dynamo-worker` as a process, with the packages of the test and no settings from outside."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = path
        self.directory = directory
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DYN_", "DYNAMO_", "ENGINE_"))}
        self.environment = {**inherited, "PYTHONPATH": str(path), "COLUMNS": "100"}

    def __call__(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one command."""
        return self.python("-m", "dynamo_worker", *argv, environment=environment)

    def python(
        self, *argv: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.run(
            [sys.executable, *argv],
            text=True,
            check=False,
            timeout=60,
            cwd=self.directory,
            env={**self.environment, **(environment or {})},
            **options,
        )


@pytest.fixture
def command(site: Site, tmp_path: Path) -> CommandLine:
    """Run `dynamo-worker` in an empty directory."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    return CommandLine(site.path, directory)
