"""Entry point of `dynamo-worker`: a worker runs under a supervisor, every other command in this process.

The supervisor process must stay small: only the standard library is imported here.
"""

from __future__ import annotations

import sys

#: Flags handled in this process.
_IN_PROCESS = frozenset({"-h", "--help", "--version", "--print-config", "--no-supervise"})


def run() -> int:
    """Run this process' command line, with the current and the script's directory off the import path."""
    from dynamo_worker.supervisor.interpreter import leave_script_directory

    leave_script_directory()
    return main()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a worker exits the process itself."""
    from dynamo_worker.supervisor import output

    output.open_standard_streams()
    if argv is None:
        argv = sys.argv[1:]
    if runs_worker(argv):
        from dynamo_worker.supervisor import supervise

        supervise(argv)
    from dynamo_worker.cli.main import main as run_here
    from dynamo_worker.cli.output import finish_output

    try:
        code = run_here(argv)
    except SystemExit as error:  # raised by argparse
        if not isinstance(error.code, int):
            raise
        code = error.code
    return finish_output(code)


def runs_worker(argv: list[str]) -> bool:
    """Return whether this command line runs a worker under a supervisor.

    A leading word is a command. Everything after a bare ``--`` belongs to the engine.
    """
    if argv and not argv[0].startswith("-"):
        return False
    own = argv[: argv.index("--")] if "--" in argv else argv
    return _IN_PROCESS.isdisjoint(own)


if __name__ == "__main__":
    sys.exit(run())
