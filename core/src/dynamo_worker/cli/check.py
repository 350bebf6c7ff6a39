"""`dynamo-worker check NAME`: import one engine or plugin, validate it, and report what is wrong with it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.commands import only_flags
from dynamo_worker.cli.output import print_error
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.plugins.facade import check
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP
from dynamo_worker.supervisor import interpreter

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE: Final = "dynamo-worker check NAME [--json] [--conformance [--only WORDS] [--slow] [-- ENGINE FLAGS]]"
#: What the conformance suite is written with.
_NEEDED: Final = ("pytest", "pytest_timeout")


def main(argv: Sequence[str]) -> int:
    """Check one plugin; the exit code is 3 if it is unusable, and 1 if the conformance suite has findings."""
    words, engine_flags = list(argv), []
    if "--" in words:
        at = words.index("--")
        words, engine_flags = words[:at], words[at + 1 :]
    only = _value(words, "--only")
    names = [word for word in words if not word.startswith("-")]
    allowed = ("--json", "--conformance", "--slow", "-h", "--help")
    flags = only_flags([word for word in words if word.startswith("-")], allowed, USAGE)
    if flags & {"-h", "--help"}:
        print(
            f"usage: {USAGE}\n\nImports the engine, the plugin or the module (in the current directory) with this name "
            "and checks its\nhooks, its flags and its API version. The exit code is 3 if it is unusable.\n\n"
            "--conformance also starts the engine, with the engine flags after a bare `--`, and runs the conformance "
            "suite:\none line per check, the exit code is 1 if it has findings. --only WORDS runs the checks whose "
            "names have these\nwords. It needs `pip install 'dynamo-worker[testing]'`."
        )
        return 0
    if len(names) != 1:
        raise UsageError(f"check: expected one name, got {len(names)}", hint=f"usage: {USAGE}")
    if "--conformance" not in flags and (only or engine_flags or "--slow" in flags):
        raise UsageError("check: --only, --slow and engine flags belong to --conformance", hint=f"usage: {USAGE}")
    records, errors = check(names[0])
    if "--json" in flags:
        print(json.dumps([{**asdict(record), "kind": record.kind} for record in records], indent=2))
    else:
        for record in records:
            if record.status == "ok":
                print(f"{record}: ok (hooks: {', '.join(record.hooks)})")
            for warning in (*record.deprecations, *record.warnings):
                print(f"{record}: warning: {warning}")
        sys.stdout.flush()
        for error in errors:
            print_error(error)
    if errors:
        return ExitCode.START_FAILED
    if "--conformance" not in flags:
        return 0
    if not any(record.group == ENGINE_GROUP for record in records):
        raise UsageError(f"check: {names[0]!r} is no engine", hint="--conformance checks engines only")
    return _run_conformance(names[0], only, "--slow" in flags, engine_flags)


def _value(words: list[str], flag: str) -> str:
    """Remove a flag with its value from a command line and return the value; empty without the flag."""
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            if not equals and at + 1 == len(words):
                raise UsageError(f"{flag} requires a value: WORDS", hint=f"usage: {USAGE}")
            taken = words[at : at + 1 if equals else at + 2]
            del words[at : at + len(taken)]
            return value if equals else taken[1]
    return ""


def _run_conformance(name: str, only: str, slow: bool, engine_flags: Sequence[str]) -> int:
    """Run the conformance suite in a process of its own, which an engine may end."""
    for needed in _NEEDED:
        if importlib.util.find_spec(needed) is None:
            raise StartError(
                f"the conformance suite needs the Python package {needed!r}, which is not installed",
                hint="pip install 'dynamo-worker[testing]'",
            )
    command = interpreter.module_command("dynamo_worker.testing.conformance_run")
    return subprocess.run([*command, name, only, "slow" if slow else "", *engine_flags], check=False).returncode
