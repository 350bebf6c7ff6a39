"""All flags of the worker, which engines and extensions therefore cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.config.runtime_options import RUNTIME_OPTIONS

if TYPE_CHECKING:
    from dynamo_worker.host.config.option_types import Option

#: Flags that are not settings.
SWITCHES: Final = {
    "--help": "Show this text; with --engine NAME, also the engine's own flags.",
    "-h": "",
    "--version": "Show the version.",
    "--print-config": "Show the effective value of every setting and its origin.",
    "--no-supervise": "Run the worker without a supervisor process (for debuggers, tests and other init systems).",
}


def own_flags() -> dict[str, Option]:
    """Return the option for each spelling of each flag that has a value or sets one."""
    return {flag: row for row in (*RUNTIME_OPTIONS, *OPTIONS) for flag in row.flags}
