"""Cleans up after earlier workers whose supervisor *and* guardian were killed, or whose machine went down."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import ledger, process_tree, recorder, run_directory, spawn
from dynamo_worker.supervisor.cleanup import Cleanup
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.loop import readable
from dynamo_worker.supervisor.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.supervisor.linux import Stat
    from dynamo_worker.supervisor.report import Log

#: Seconds a sweep may take for all directories together.
_LIMIT = 60


def sweep_in_background(own: RunDirectory, discovery_root: str, log: Log) -> None:
    """Sweep the directory that contains our own, in a forked process if there is work; the caller only reaps it.

    :param discovery_root: the only directory in which registrations are withdrawn.
    :raises OSError: out of processes.
    """
    stale = [path for path in run_directory.candidates(own.base) if path != own.path]
    supervisor = os.getpid()
    if not stale or spawn.fork() != 0:
        return
    try:
        spawn.reset_signals()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(_LIMIT)
        spawn.close_descriptors()
        log.output.forget()
        for path in stale:
            _sweep(path, supervisor, discovery_root, log)
        log.drain()
    finally:
        os._exit(0)


def _sweep(path: str, supervisor: int, discovery_root: str, log: Log) -> None:
    """Clean up after one earlier worker if it is dead. A failure must not keep the others from their turn."""
    try:
        _clean_up(path, supervisor, discovery_root, log)
    except Exception as error:
        described = f"{type(error).__name__}: {error}"
        log.warning("Cleaning up after an earlier worker failed", run_dir=path, error=described)


def _clean_up(path: str, supervisor: int, discovery_root: str, log: Log) -> None:
    directory = RunDirectory.take_over(path)
    if directory is None:
        return
    processes = ledger.read_processes(directory.descriptor) if directory.knows_its_pids else []
    recorded = [Process(*entry) for entry in processes]

    def find() -> Mapping[Process, Stat]:
        return process_tree.left_of(path, directory.mark, recorded, supervisor)

    def wait(seconds: float, descriptor: int | None) -> None:
        if descriptor is None:
            time.sleep(min(seconds, 0.05))
        else:
            readable(descriptor, seconds)

    record = recorder.reference(directory.descriptor)
    report = Cleanup(
        directory, find=find, reap=_reap, wait=wait, log=log, patient=False, discovery_root=discovery_root
    ).run()
    log.info(
        "Cleaned up after an earlier worker",
        run_dir=path,
        processes=report["processes"],
        segments=report["segments"],
        withdrawn=", ".join(report["withdrawn"]) or None,
    )
    directory.close()
    if record is not None:
        with contextlib.suppress(OSError):  # it may be gone, or be full: only a record
            recorder.complete(record, report)


def _reap() -> bool:
    """Return False: the remaining processes of another tree are not our children."""
    return False
