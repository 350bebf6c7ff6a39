"""The flags that a plugin and the worker both define."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dynamo_worker.host.config.options import OPTIONS

if TYPE_CHECKING:
    import argparse

#: The worker's flags that are not settings.
_SWITCHES: Final = frozenset({"--help", "-h", "--version", "--print-config", "--no-supervise"})


def colliding(parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a plugin's parser that the worker takes."""
    own = {flag for row in OPTIONS for flag in row.flags} | _SWITCHES
    return [flag for action in parser._actions for flag in action.option_strings if flag in own]  # noqa: SLF001
