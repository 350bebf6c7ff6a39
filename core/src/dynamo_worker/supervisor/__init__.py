"""The worker's parent process: guarantees a clean end, whatever the worker does. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence


def supervise(argv: Sequence[str], *, command: Sequence[str] | None = None) -> NoReturn:
    """Run a worker under supervision and end this process with the exit code.

    :param argv: the command line of ``dynamo-worker``, without its name.
    :param command: what to run instead of ``python -P -m dynamo_worker --no-supervise``; ``argv`` is appended.
    """
    # Imported late: the worker imports this package too, for its ledger.
    from dynamo_worker.supervisor.supervisor import supervise

    supervise(argv, command=command)


__all__ = ["supervise"]
