"""Errors about plugins: which one, what is wrong, where, and what to do next."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from dynamo_worker import hookspecs
from dynamo_worker.errors import StartError, UsageError, describe
from dynamo_worker.host.plugins.installed_plugins import PLUGIN_GROUP, PluginRecord
from dynamo_worker.host.plugins.plugin_imports import what_moved

_PACKAGE: Final = Path(hookspecs.__file__).parent


class PluginError(StartError):
    """A chosen plugin cannot be used (exit code 3). ``record`` says which one, with its status."""

    def __init__(self, record: PluginRecord, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.record = record


class UnknownPluginError(UsageError):
    """The command line names an engine or a plugin that is not installed (exit code 2)."""


def failed(record: PluginRecord, what: str, error: BaseException) -> PluginError:
    """Return the error for a plugin whose code raised.

    :param what: what it cannot do, such as ``cannot be imported``.
    """
    moved = what_moved(error)
    if moved is not None:
        return PluginError(
            replace(record, status="incompatible"),
            f"{record} {moved} ({where(error)})",
            hint=f"upgrade {record.dist}, or import what docs/plugins.md lists"
            if record.dist
            else "import what docs/plugins.md lists",
        )
    return PluginError(
        replace(record, status="broken"),
        f"{record} {what}: {describe(error)} ({where(error)})",
        hint=way_out(record),
    )


def way_out(record: PluginRecord) -> str:
    """Return what an operator can do about a broken plugin."""
    if record.group == PLUGIN_GROUP:
        return f"upgrade {record.dist}, or leave the plugin out with --no-plugin {record.name}"
    return f"upgrade or reinstall {record.dist}" if record.dist else "fix the module"


def install_hint(record: PluginRecord, missing: str) -> str:
    """Return how to install a missing package: by an extra of the plugin's package if it has any."""
    try:
        extras = distribution(record.dist).metadata.get_all("Provides-Extra") or [] if record.dist else []
    except PackageNotFoundError:
        extras = []
    if extras:
        choice = " or ".join(f"`pip install '{record.dist}[{extra}]'`" for extra in extras)
        return f"install it: {choice}"
    without = f", or leave the plugin out with --no-plugin {record.name}" if record.group == PLUGIN_GROUP else ""
    return f"install it: `pip install {missing.partition('.')[0]}`{without}"


def where(error: BaseException) -> str:
    """Return the last line of a plugin in an exception's traceback, as ``file:line``."""
    # No line of the plugin raises a SyntaxError; it carries its location.
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    foreign = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_a_plugin(frame.filename)]
    return f"{foreign[-1].filename}:{foreign[-1].lineno}" if foreign else "before any line of the plugin"


def _is_of_a_plugin(filename: str) -> bool:
    """Return whether a file is a plugin's: not of this package (except its engines), importlib or pluggy."""
    path = Path(filename).absolute()
    if filename.startswith("<frozen") or path.parent == Path(importlib.__file__).parent or "pluggy" in path.parts:
        return False
    return not path.is_relative_to(_PACKAGE) or path.is_relative_to(_PACKAGE / "engines")
