"""The flags that a plugin and the worker both define."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.host.config.own_flags import SWITCHES, own_flags

if TYPE_CHECKING:
    import argparse


def colliding(parser: argparse.ArgumentParser, plugin: object) -> list[str]:
    """Return the flags of a plugin's parser that the worker takes, because the plugin does not claim them.

    :param plugin: the module or the object; its ``claimed_flags`` are its engine's.
    """
    taken = {*own_flags(), *SWITCHES}.difference(getattr(plugin, "claimed_flags", ()))
    return [flag for action in parser._actions for flag in action.option_strings if flag in taken]  # noqa: SLF001
