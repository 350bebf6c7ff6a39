"""What a plugin declares about its engine's own command line, without importing the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.plugins.plugin_errors import PluginError

if TYPE_CHECKING:
    from dynamo_worker.host.plugins.installed_plugins import PluginRecord

#: The options that an engine may claim a flag of: the worker has another flag for them.
_SHARED: Final = {flag: row for row in OPTIONS if row.alias for flag in row.flags}


@dataclass(frozen=True)
class EngineFlags:
    """How an engine's own command line differs from plain ``argparse``.

    :param claimed: flags of the worker that are the engine's.
    :param file: the engine's flag for a YAML file of its flags.
    :param abbreviated: whether a flag may be given by its beginning.
    :param command: whether the words after a bare ``--`` are a command, in which nothing is the engine's flag.
    """

    claimed: frozenset[str] = frozenset()
    file: str = ""
    abbreviated: bool = False
    command: bool = False

    @classmethod
    def of(cls, record: PluginRecord, plugin: object) -> EngineFlags:
        """Return what the attributes of a plugin say; most plugins have none of them.

        :raises PluginError: it claims a flag that the worker could then not be given.
        """
        claimed = frozenset(getattr(plugin, "claimed_flags", ()))
        for flag in sorted(claimed):
            row = _SHARED.get(flag)
            if row is None or claimed.issuperset(row.flags):
                raise PluginError(
                    replace(record, status="broken"),
                    f"{record} claims {flag}, for which the worker has no other name",
                    hint=f"`claimed_flags` may hold one name each of {', '.join(sorted(_SHARED))}",
                )
        return cls(
            claimed,
            getattr(plugin, "flags_file", ""),
            getattr(plugin, "abbreviated_flags", False),
            getattr(plugin, "takes_command", False),
        )
