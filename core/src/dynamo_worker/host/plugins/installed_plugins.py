"""Installed plugins, read from package metadata without importing any of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

#: Entry-point group of engines: exactly one is chosen with ``--engine NAME``.
ENGINE_GROUP: Final = "dynamo_worker.engines"
#: Entry-point group of extensions: ``--installed-plugins`` and ``--no-plugin`` choose among them.
PLUGIN_GROUP: Final = "dynamo_worker.plugins"
#: Stands for an entry-point group in the records of modules loaded with ``-p MODULE``.
LOCAL_GROUP: Final = "module"

#: ``module``, ``package.module`` or ``package.module:object``, with the extras that old packages may append.
_REFERENCE: Final = re.compile(r"(?P<module>[\w.]+)(\s*:\s*(?P<attributes>[\w.]+))?(\s*\[.*\])?")

#: ``installed``: named by metadata, not imported. ``ok``: imported and validated. ``disabled``: left out by a flag.
#: ``missing``: its module, or a package it needs, is not installed. ``broken``: it raises, or is not a valid plugin.
#: ``incompatible``: written for another version of the plugin API. ``ambiguous``: several packages offer the name.
Status = Literal["installed", "ok", "disabled", "missing", "broken", "incompatible", "ambiguous"]


@dataclass(frozen=True)
class PluginRecord:
    """One plugin and its state.

    :param name: the name under which it is chosen.
    :param group: its entry-point group, or ``module`` for ``-p MODULE``.
    :param value: the object that the entry point names, ``package.module:object``.
    :param dist: the distribution it comes from; empty for a local module.
    :param version: the version of that distribution.
    :param status: see :data:`Status`.
    :param error: what is wrong with it, in one sentence.
    :param hooks: the hooks it implements; empty until it is imported.
    :param deprecations: the deprecated parts of the API that it uses; empty until it is imported.
    :param warnings: what ``dynamo-worker check`` found that a worker can live with.
    """

    name: str
    group: str
    value: str
    dist: str = ""
    version: str = ""
    status: Status = "installed"
    error: str | None = None
    hooks: tuple[str, ...] = ()
    deprecations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Return ``engine`` or ``plugin``."""
        return "engine" if self.group == ENGINE_GROUP else "plugin"

    @property
    def identity(self) -> dict[str, str]:
        """The name and the version as fields of a log line; a local module has no version."""
        return {self.kind: self.name, **({"version": self.version} if self.version else {})}

    def __str__(self) -> str:
        """Return the plugin's name in messages: ``engine 'vllm' from dynamo-worker-vllm 0.3.1``."""
        source = f" from {self.dist} {self.version}" if self.dist else ""
        return f"{self.kind} {self.name!r}{source}"


def is_loaded(name: str, allowed: Collection[str] = ("all",), disabled: Collection[str] = ()) -> bool:
    """Return whether an installed extension is loaded.

    :param allowed: names of extensions to load, or ``all`` or ``none``.
    :param disabled: names of extensions to leave out.
    """
    return name not in disabled and (name in allowed or "all" in allowed)


def discover(disabled: Collection[str] = (), allowed: Collection[str] = ("all",)) -> list[PluginRecord]:
    """Return a record for every installed engine and extension, without importing any of them.

    :param disabled: names of extensions to leave out.
    :param allowed: names of extensions to load, see :func:`is_loaded`.
    """
    records = []
    for group in (ENGINE_GROUP, PLUGIN_GROUP):
        entries = find(group)
        offers = [entry.name for entry in entries]
        for entry in entries:
            record = record_of(entry)
            if offers.count(entry.name) > 1:
                others = ", ".join(sorted(source(e) for e in entries if e.name == entry.name and e != entry))
                record = replace(record, status="ambiguous", error=f"{others} offers the same name")
            elif group == PLUGIN_GROUP and not is_loaded(entry.name, allowed, disabled):
                record = replace(record, status="disabled")
            elif (module := reference(entry)[0]) is None:
                record = replace(record, status="broken", error=f"its entry point {entry.value!r} is malformed")
            elif not module_exists(module.partition(".")[0]):
                record = replace(record, status="missing", error=f"its module {module!r} cannot be found")
            records.append(record)
    return records


def find(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, sorted by name and distribution."""
    return sorted(entry_points(group=group), key=lambda entry: (entry.name, source(entry)))


def source(entry: EntryPoint) -> str:
    """Return the distribution of an entry point with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"


def record_of(entry: EntryPoint) -> PluginRecord:
    """Return the record of a plugin as its metadata describes it."""
    dist = entry.dist
    return PluginRecord(entry.name, entry.group, entry.value, dist.name if dist else "", dist.version if dist else "")


def reference(entry: EntryPoint) -> tuple[str | None, list[str]]:
    """Return the module and the attribute path of an entry point; the module is None if it is malformed."""
    match = _REFERENCE.fullmatch(entry.value)
    if match is None:
        return None, []
    return match["module"], match["attributes"].split(".") if match["attributes"] else []


def module_exists(name: str) -> bool:
    """Return whether a top-level module can be imported, without importing it."""
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def describe_records(records: Iterable[PluginRecord]) -> str:
    """Return the plugins as one line for crash reports."""
    return ", ".join(f"{r.name} ({r.dist} {r.version}, {r.status})" for r in records) or "none"
