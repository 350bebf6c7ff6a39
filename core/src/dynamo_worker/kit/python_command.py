"""The command with which an engine starts its own Python processes, without the current directory on their path."""

from __future__ import annotations

from dynamo_worker.supervisor import interpreter


def python_command(module: str) -> list[str]:
    """Return the command that runs a module in this interpreter, like ``python -m``.

    ``python -m`` alone would import any file of the current directory that has the name of a library.
    """
    return interpreter.module_command(module)
