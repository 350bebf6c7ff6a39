"""The effective configuration of a worker: every setting with its origin, and the engine's flags."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from dynamo_worker import __version__
from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.text import without_secrets

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from pathlib import Path

    from dynamo_worker.cli.engine_parser import EngineParser
    from dynamo_worker.host.config.settings import WorkerSettings

log = get_logger(__name__)

#: Characters of one value of the engine's.
_MOST_CHARACTERS: Final = 100_000
#: The column of the comments.
_COLUMN: Final = 48


def text(
    values: WorkerSettings,
    parser: EngineParser | None,
    engine_args: argparse.Namespace | None,
    variables: Mapping[str, str],
) -> str:
    """Return all settings as YAML without secrets, with the origin of each value in a comment.

    :param parser: the engine's parser, which knows the defaults; None without an engine.
    :param variables: what the command line sets in the environment.
    """
    import yaml

    def scalar(value: object) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        return text.removesuffix("\n").removesuffix("\n...")

    dumped = values.model_dump(mode="json")
    lines = [
        (f"{row.name}: {scalar(without_secrets(row.name, dumped[row.name]))}", str(values.origin(row.name)))
        for row in OPTIONS
        if row.name != "config"  # not a key of the file
    ]
    if parser is not None and engine_args is not None:
        changed = {k: v for k, v in vars(engine_args).items() if v != parser.get_default(k)}
        for key, value in changed.items():
            shown = value if isinstance(value, (str, int, float, bool, list, dict)) else str(value)
            if not any("engine_args:" in text for text, _ in lines):
                lines.append(("engine_args:", "only values that differ from the engine's defaults"))
            lines.append((f"  {key}: {scalar(without_secrets(key, shown, _MOST_CHARACTERS))}", "command line or file"))
    lines += [(f"# {name}={without_secrets(name, value)}", "command line") for name, value in variables.items()]
    width = min(max(len(text) for text, _ in lines), _COLUMN)
    source = f", with {values.config}" if values.config else ""
    head = f"# dynamo-worker {__version__}: effective settings{source}\n"
    return head + "".join(f"{text.ljust(width)}  # {origin}\n" for text, origin in lines)


def dump(
    path: Path,
    values: WorkerSettings,
    parser: EngineParser,
    engine_args: argparse.Namespace,
    variables: Mapping[str, str],
) -> None:
    """Write the effective configuration to a file, before the worker has an event loop.

    A failure is logged, and does not keep the worker from serving.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o644)
        with open(open_regular(path, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8") as file:
            file.write(text(values, parser, engine_args, variables))
    except OSError as error:
        log.warning("Cannot write the configuration", path=path, error=error.strerror or error)
