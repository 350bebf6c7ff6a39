"""The command line in this process: choose the command, and be the one place where errors become messages."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import IO, TYPE_CHECKING

from dynamo_worker import __version__
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.supervisor.text import safe

if TYPE_CHECKING:
    from typing import TypeGuard

#: Why output cannot be written, apart from a reader that is gone.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

#: The commands beside running a worker, with what `--help` says about them.
COMMANDS = {
    "engines": "list the installed engines and plugins",
    "check": "import one engine or plugin and say what is wrong with it",
    "plan": "draw the shutdown timeline for the given settings",
    "frontend": "run the OpenAI HTTP frontend alone",
}


def main(argv: list[str]) -> int:
    """Run one command and return its exit code; every error ends as a message on stderr."""
    from dynamo_worker.errors import WorkerError, describe, shortage

    try:
        return _dispatch(argv)
    except WorkerError as error:
        print_error(error)
        return _end(error.exit_code, str(error.args[0]))
    except KeyboardInterrupt:
        return _end(SIGNAL_BASE + 2, "interrupted (KeyboardInterrupt)")
    except BrokenPipeError:
        return SIGNAL_BASE + 13  # the reader of the output is gone (`dynamo-worker --help | head`)
    except SystemExit:
        raise
    except BaseException as error:
        if _is_about_output(error):
            print_error(OSError(f"the output cannot be written: {error.strerror}"))
            return ExitCode.FATAL
        missing = shortage(error)
        if missing is not None:
            print_error(missing)
            return _end(missing.exit_code, str(missing.args[0]))
        from dynamo_worker.host.crash_report import print_crash

        with contextlib.suppress(OSError):
            print_crash(error)
        return _end(ExitCode.FATAL, f"bug in dynamo-worker: {describe(error)}")


def print_error(error: Exception) -> None:
    """Print an expected error: what is wrong, and what to do next."""
    with contextlib.suppress(OSError):
        print(f"dynamo-worker: error: {safe(str(error))}", file=sys.stderr)


def finish_output(code: int) -> int:
    """Write out what waits in buffers; return the exit code, which depends on that if all else went well.

    The interpreter would try it at its end, and exit with 120 where that fails.
    """
    error = _flush(sys.stdout)
    if error is not None and code == ExitCode.STOPPED:
        code = SIGNAL_BASE + 13
        if not isinstance(error, BrokenPipeError):
            code = ExitCode.FATAL
            print_error(OSError(f"the output cannot be written: {error.strerror}"))
    _flush(sys.stderr)
    return code


def _flush(stream: IO[str]) -> OSError | None:
    """Write out what waits; what cannot be written is thrown away, and why is returned."""
    try:
        stream.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        return error
    return None


def _end(code: int, reason: str) -> int:
    """Return the exit code; as a worker, tell the supervisor the cause and end right here.

    The interpreter's own end gives signals their default actions back, and one that came then would replace the code.
    """
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

    control = SupervisorChannel.from_environment()
    if control.supervised:
        control.send("exit", code=code, reason="; ".join(reason.splitlines()))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or none at all
                stream.flush()
        os._exit(code)
    return code


def _is_about_output(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error came of writing an answer: it names no file, and no worker has begun to run."""
    return (
        isinstance(error, OSError)
        and error.errno in _UNWRITABLE
        and error.filename is None
        and "dynamo_worker.host.launcher" not in sys.modules
    )


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
        from dynamo_worker.host import frontend

        return frontend.main(argv[1:])
    if command:
        from dynamo_worker.cli.report import unknown_command

        raise unknown_command(command)
    from dynamo_worker.cli import run

    return run.main(argv)
