"""`dynamo-worker explain`: tell the end of a worker, from its flight record."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.arguments import load_settings, split
from dynamo_worker.cli.explain import records, screen
from dynamo_worker.errors import UsageError
from dynamo_worker.supervisor.record_file import default_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.cli.arguments import CommandLine

USAGE: Final = "dynamo-worker explain [FILE | --last] [--record-dir DIR] [--json] [--html FILE]"

_HELP: Final = f"""usage: {USAGE}

Tells how a worker ended, from its flight record: the cause, the stage, what became of the requests, how long each stage
took against its plan, what was cleaned up, and what to do next. Without FILE, the last worker that has ended is meant.

  --last            the same, in words
  --record-dir DIR  where the records are; the worker's own flags, variables and --config file say it, too
  --json            print everything as one JSON object
  --html FILE       write one self-contained page with the timeline as a picture"""


def main(argv: Sequence[str]) -> int:
    """Print the account; the exit code is 0 however the worker ended."""
    words, page = _without_page(argv)
    line = split(words, ("--json", "--last", "-h", "--help"))
    if line.switches & {"-h", "--help"}:
        print(_HELP)
        return 0
    unknown = [word for word in line.rest if word.startswith("-")]
    if unknown or len(line.rest) > 1 or (line.rest and "--last" in line.switches):
        wrong = unknown[0] if unknown else line.rest[-1]
        raise UsageError(f"unknown argument {wrong!r}", hint=f"usage: {USAGE}")
    told = records.of_file(line.rest[0]) if line.rest else records.last(_directory(line))
    if page is not None:
        from dynamo_worker.cli.explain.page import html

        _write(page, html(told))
    if "--json" in line.switches:
        print(json.dumps(told.as_json(), indent=2))
    elif page is None:
        print("\n".join(screen.lines(told)))
    else:
        print(f"Written: {page}")
    return 0


def _without_page(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Take ``--html FILE`` out of the command line."""
    words, page = list(argv), None
    for index, word in enumerate(words):
        if word == "--html":
            if index + 1 == len(words) or words[index + 1].startswith("-"):
                raise UsageError("--html requires a value: FILE", hint=f"usage: {USAGE}")
            page = words[index + 1]
            del words[index : index + 2]
            break
        if word.startswith("--html="):
            page = word.partition("=")[2]
            del words[index]
            break
    return words, page


def _directory(line: CommandLine) -> str:
    """Return where the worker with these settings keeps its records.

    :raises UsageError: there is no place for them.
    """
    settings, _ = load_settings(line)
    directory = default_directory(os.environ) if settings.record_dir is None else str(settings.record_dir)
    if directory is None:
        raise UsageError("no flight records: there is no home directory", hint="--record-dir DIR names their place")
    return directory


def _write(path: str, page: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="--html takes the path of a new file"
        ) from error
