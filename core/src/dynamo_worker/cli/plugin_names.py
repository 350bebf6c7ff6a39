"""The names of a new engine plugin: valid, and nobody else's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Final

from dynamo_worker.errors import UsageError, shown
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, discover, module_exists
from dynamo_worker.supervisor.text import safe

#: Words of small letters and digits, joined by single dashes or underscores: valid as the name of a distribution, of a
#: module and in file names.
_VALID: Final = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_MOST_CHARACTERS: Final = 40
_HINT: Final = "use small letters, digits and single dashes, beginning with a letter, such as my-engine"


@dataclass(frozen=True)
class PluginNames:
    """The names of one engine plugin.

    :param engine: as for ``--engine``.
    :param distribution: as for ``pip install``.
    :param module: as for ``import``. Its beginning keeps it from hiding the library that the engine wraps.
    :param title: with which its classes begin.
    """

    engine: str
    distribution: str
    module: str
    title: str

    @classmethod
    def of(cls, engine: str) -> PluginNames:
        """Return the names for an engine, without asking whether they are free.

        :raises UsageError: the name is not valid.
        """
        if len(engine) > _MOST_CHARACTERS:
            raise UsageError(f"the name {shown(engine)} has {len(engine)} characters; at most {_MOST_CHARACTERS}")
        if not _VALID.fullmatch(engine):
            raise UsageError(f"{safe(repr(engine))} is no name for an engine{_suggestion(engine)}", hint=_HINT)
        for prefix in ("dynamo-worker-", "dynamo_worker_"):
            if engine.startswith(prefix):
                short = engine.removeprefix(prefix)
                raise UsageError(
                    f"{engine!r} is the name of a package; the engine's alone is wanted",
                    hint=f"dynamo-worker new {short}",
                )
        words = re.split("[-_]", engine)
        return cls(
            engine,
            f"dynamo-worker-{'-'.join(words)}",
            f"dynamo_worker_{'_'.join(words)}",
            "".join(word.capitalize() for word in words),
        )

    def refuse_taken(self) -> None:
        """Check that no installed engine, package or module has one of the names.

        :raises UsageError: one of them is taken.
        """
        for record in discover():
            if record.group == ENGINE_GROUP and record.name == self.engine:
                raise UsageError(
                    f"there is an engine {self.engine!r} already, from {record.dist} {record.version}",
                    hint="choose another name; `dynamo-worker engines` lists those that are taken",
                )
        try:
            version = distribution(self.distribution).version
        except PackageNotFoundError:
            version = ""
        if version:
            raise UsageError(
                f"the package {self.distribution} {version} is installed already",
                hint=f"choose another name, or: pip uninstall {self.distribution}",
            )
        if module_exists(self.module):
            raise UsageError(
                f"there is a module {self.module} already, which the new one would hide or be hidden by",
                hint="choose another name",
            )

    def put_into(self, text: str) -> str:
        """Return a template's text, or a path in it, with these names in place of those of `acme`."""
        text = text.replace("dynamo_worker_acme", self.module).replace("dynamo-worker-acme", self.distribution)
        return text.replace("Acme", self.title).replace("acme", self.engine)


def _suggestion(engine: str) -> str:
    """Return ``, did you mean X?`` with the nearest name that is valid, or nothing."""
    near = re.sub(r"[^a-z0-9]+", "-", engine.lower()).strip("-0123456789")
    return f", did you mean {near}?" if _VALID.fullmatch(near) else ""
