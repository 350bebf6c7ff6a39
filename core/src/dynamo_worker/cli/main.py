"""`dynamo-worker`: choose the command, and turn every error into a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

from dynamo_worker import __version__
from dynamo_worker.cli.output import print_error
from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode

if TYPE_CHECKING:
    from typing import TypeGuard

#: Why writing output can fail, apart from a closed pipe.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: list[str]) -> int:
    """Run one command and return its exit code; every error becomes a message on stderr."""
    from dynamo_worker.errors import WorkerError, describe, shortage

    try:
        return _dispatch(argv)
    except WorkerError as error:
        print_error(error)
        return _end(error.exit_code, str(error.args[0]))
    except KeyboardInterrupt:
        return _end(SIGNAL_BASE + 2, "interrupted (KeyboardInterrupt)")
    except BrokenPipeError:
        return SIGNAL_BASE + 13  # the reader closed the pipe (`dynamo-worker --help | head`)
    except SystemExit:
        raise
    except BaseException as error:
        if _is_about_output(error):
            print_error(OSError(f"cannot write output: {error.strerror}"))
            return ExitCode.FATAL
        missing = shortage(error)
        if missing is not None:
            print_error(missing)
            return _end(missing.exit_code, str(missing.args[0]))
        from dynamo_worker.host.crash_report import print_crash

        with contextlib.suppress(OSError):
            print_crash(error)
        return _end(ExitCode.FATAL, f"bug in dynamo-worker: {describe(error)}")


def _end(code: int, reason: str) -> int:
    """Return the exit code; in a supervised worker, report the cause to the supervisor and exit immediately.

    A normal exit restores the default signal actions, and a signal at that point would replace the exit code.
    """
    from dynamo_worker.host.supervisor_channel import SupervisorChannel

    control = SupervisorChannel.from_environment()
    if control.supervised:
        control.send("exit", code=code, reason="; ".join(reason.splitlines()))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full or missing
                stream.flush()
        os._exit(code)
    return code


def _is_about_output(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error comes from writing output: it names no file, and no worker has started."""
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
    if command == "new":
        from dynamo_worker.cli import new

        return new.main(argv[1:])
    if command == "plan":
        from dynamo_worker.cli import plan

        return plan.main(argv[1:])
    if command == "explain":
        from dynamo_worker.cli.explain import command as explain

        return explain.main(argv[1:])
    if command == "top":
        from dynamo_worker.cli.top import command as top

        return top.main(argv[1:])
    if command == "drain":
        from dynamo_worker.cli import drain

        return drain.main(argv[1:])
    if command == "resume":
        from dynamo_worker.cli import resume

        return resume.main(argv[1:])
    if command == "frontend":
        from dynamo_worker.host.frontend import main as frontend

        return frontend.main(argv[1:])
    if command:
        from dynamo_worker.cli.commands import unknown_command

        raise unknown_command(command)
    from dynamo_worker.cli import run

    return run.main(argv)
