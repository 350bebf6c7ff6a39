"""The command line in this process: choose the command, and be the one place where errors become messages."""

from __future__ import annotations

import sys

from dynamo_worker import __version__
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode

#: The commands beside running a worker, with what `--help` says about them.
COMMANDS = {
    "engines": "list the installed engines and plugins",
    "check": "import one engine or plugin and say what is wrong with it",
    "plan": "draw the shutdown timeline for the given settings",
    "frontend": "run the OpenAI HTTP frontend alone",
}


def main(argv: list[str]) -> int:
    """Run one command and return its exit code; every error ends as a message on stderr."""
    from dynamo_worker.errors import WorkerError

    try:
        return _dispatch(argv)
    except WorkerError as error:
        print_error(error)
        _tell_supervisor(error.exit_code, str(error.args[0]))
        return error.exit_code
    except KeyboardInterrupt:
        return SIGNAL_BASE + 2
    except BrokenPipeError:
        # The reader of the output is gone (`dynamo-worker --help | head`). Nothing may be written at exit either.
        sys.stdout = None
        return SIGNAL_BASE + 13
    except Exception as error:
        from dynamo_worker.cli.report import print_crash

        print_crash(error)
        _tell_supervisor(ExitCode.FATAL, f"bug in dynamo-worker: {type(error).__name__}: {error}")
        return ExitCode.FATAL


def print_error(error: Exception) -> None:
    """Print an expected error: what is wrong, and what to do next."""
    print(f"dynamo-worker: error: {error}", file=sys.stderr)


def _tell_supervisor(code: int, reason: str) -> None:
    """Let the supervisor, if there is one, report the cause of an end before the launcher could run."""
    from dynamo_worker.control import ControlChannel

    ControlChannel.from_environment().send("exit", code=code, reason="; ".join(reason.splitlines()))


def _dispatch(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"dynamo-worker {__version__}")
        return 0
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command == "engines":
        from dynamo_worker.cli import engines

        return engines.main(argv[1:])
    if command == "check":
        from dynamo_worker.cli import check

        return check.main(argv[1:])
    if command == "plan":
        from dynamo_worker.cli import plan

        return plan.main(argv[1:])
    if command == "frontend":
        from dynamo_worker import frontend

        return frontend.main(argv[1:])
    if command:
        from dynamo_worker.cli.report import unknown_command

        raise unknown_command(command)
    from dynamo_worker.cli import run

    return run.main(argv)
