"""What a run prints in the end: the faults with what they cost, the requests, and every failure with its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaos_run.accounts import OUTCOMES, Accounts
from chaos_run.table import BY_NAME
from common.report import seconds, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos_run.table import Row

#: Failures that are printed in full.
_PRINTED = 30


def print_summary(accounts: Accounts, rows: Sequence[Row]) -> None:
    """Print the tables and the failures.

    :param rows: all that could be committed here; those that never were are shown, too.
    """
    names = [row.name for row in rows] + [name for name in accounts.rows if name not in BY_NAME]
    body = []
    for name in names:
        account = accounts.rows[name]
        row = BY_NAME.get(name)
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(account.exits.items())) or "goes on"
        failures = ", ".join(f"{count} {kind}" for kind, count in account.failures.items()) or "none"
        bound = seconds(row.bound) if row else "-"
        slowest = seconds(account.slowest) if account.committed or account.exits else "-"
        body.append([name, str(account.committed), codes, slowest, bound, failures])
    table("Faults", ["fault", "times", "exit codes", "slowest", "bound", "failures"], body)
    kinds = sorted(accounts.kinds)
    table(
        "Requests",
        ["kind of client", *OUTCOMES],
        [[kind, *(str(accounts.kinds[kind][outcome]) for outcome in OUTCOMES)] for kind in kinds]
        + [["all", *(str(accounts.outcomes[outcome]) for outcome in OUTCOMES)]],
    )
    for why, count in sorted(accounts.excuses.items()):
        print(f"not counted as lost: {count}, {why}")
    for failure in accounts.failures[:_PRINTED]:
        print(f"\nFAILURE ({failure.kind}) {failure.text}")
        for fault in failure.faults:
            print(f"  during {fault}")
        for line in failure.log.splitlines():
            print(f"  | {line}")
    hidden = sum(accounts.failed.values()) - min(len(accounts.failures), _PRINTED)
    if hidden:
        print(f"\n… and {hidden} failures more")


def verdict(accounts: Accounts, elapsed: float, cpu: float, retried: int, not_sent: int) -> str:
    """Return what came of the run in one paragraph."""
    failed = sum(accounts.failed.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(accounts.failed.items()))
    return (
        f"{accounts.faults} faults in {elapsed / 60:.1f} minutes ({accounts.faults / elapsed * 3600:.0f} per hour); "
        f"{accounts.requests} requests, {accounts.tokens} characters; {retried} requests tried another frontend, "
        f"{not_sent} not sent; at least {cpu / elapsed:.0%} of one processor; "
        + (f"FAILED: {failed} failures ({kinds})" if failed else "no failure")
    )


def results(accounts: Accounts, elapsed: float, cpu: float, retried: int, not_sent: int) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "seconds": elapsed,
        "cpu_seconds": cpu,
        "retried": retried,
        "not_sent": not_sent,
        **accounts.as_json(),
    }
