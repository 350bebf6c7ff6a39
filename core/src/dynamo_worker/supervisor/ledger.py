"""Records of everything to undo after the worker: written before it is done, read by the process that cleans up.

The run directory holds ``ledger.jsonl`` (registrations and the frontend, appended by the worker), ``segments.json``
(shared memory) and ``processes.json`` (both rewritten by the guardian). The worker imports this module too.

Cleaning works through a descriptor of the directory, and trusts only files that no other user can have written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from typing import TYPE_CHECKING, Any, Union

from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

#: The run directory: its path (``$DYNAMO_WORKER_RUN_DIR``) or a descriptor of it.
RunDir = Union[str, "os.PathLike[str]", int]

#: The file that records registrations.
LEDGER = "ledger.jsonl"
_SEGMENTS = "segments.json"
_PROCESSES = "processes.json"

#: Bytes of a record that are read: room for tens of thousands of processes.
_MOST_BYTES = 4 << 20

#: Errors of malformed records: not JSON, wrong types, ``Infinity`` for an integer, too many brackets.
_MALFORMED = (ValueError, TypeError, OverflowError, RecursionError)


def record_registration(
    run_dir: RunDir,
    backend: str,
    instance_id: int | str,
    *,
    root: str | os.PathLike[str] | None = None,
    publishers: Sequence[str] = (),
) -> None:
    """Record a registration with a discovery service, *before* it is made; a later record of it replaces the first.

    :param backend: ``file``, ``etcd``, ``kubernetes`` or ``mem``.
    :param instance_id: the Dynamo instance id, as a number or in hexadecimal digits; with ``etcd`` also the lease.
    :param root: of the ``file`` backend.
    :param publishers: ids of the worker's event publishers in the ``file`` backend, in hexadecimal digits.
    """
    where: dict[str, Any] = {} if root is None else {"root": os.path.abspath(root)}
    if publishers:
        where["publishers"] = list(publishers)
    _append(run_dir, {"kind": "registration", "backend": backend, "instance": _hex(instance_id), **where})


def registrations(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the recorded registrations, skipping malformed lines."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(run_dir, "registration"):
        if "instance" in entry:
            found[f"{entry.get('backend')}/{entry['instance']}"] = entry
    return list(found.values())


def record_frontend(run_dir: RunDir, process: Process, seconds: float) -> None:
    """Record the frontend beside the worker.

    :param seconds: how long it may outlive the worker to finish its streams.
    """
    _append(run_dir, {"kind": "frontend", "pid": process.pid, "start": process.start, "seconds": seconds})


def frontend(run_dir: RunDir) -> tuple[Process, float] | None:
    """Return the recorded frontend and the seconds it may outlive the worker, or None if there was none."""
    entries = _entries(run_dir, "frontend")
    try:
        entry = entries[-1]
        process, seconds = Process(int(entry["pid"]), int(entry["start"])), float(entry["seconds"])
    except (IndexError, KeyError, *_MALFORMED):
        return None
    return (process, seconds) if process.pid > 0 and 0 <= seconds < math.inf else None


def _entries(run_dir: RunDir, kind: str) -> list[dict[str, Any]]:
    """Return the entries of one kind, skipping malformed lines."""
    try:
        lines = _read(run_dir, LEDGER).split(b"\n")
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except _MALFORMED:
            continue
        if isinstance(entry, dict) and entry.get("kind") == kind:
            entries.append(entry)
    return entries


def write_segments(run_dir: RunDir, segments: Iterable[tuple[str, int]]) -> None:
    """Replace the record of shared-memory segments: names under ``/dev/shm``, each with its inode."""
    _replace(run_dir, _SEGMENTS, segments)


def read_segments(run_dir: RunDir) -> list[tuple[str, int]]:
    """Return the recorded shared-memory segments; none if the record is missing or malformed."""
    try:
        return [(str(name), int(inode)) for name, inode in json.loads(_read(run_dir, _SEGMENTS))]
    except (OSError, *_MALFORMED):
        return []


def write_processes(run_dir: RunDir, processes: Iterable[tuple[int, int]]) -> None:
    """Replace the record of the tree's processes: pids, each with its start time."""
    _replace(run_dir, _PROCESSES, processes)


def read_processes(run_dir: RunDir) -> list[tuple[int, int]]:
    """Return the recorded processes; none if the record is missing or malformed."""
    try:
        return [(int(pid), int(start)) for pid, start in json.loads(_read(run_dir, _PROCESSES))]
    except (OSError, *_MALFORMED):
        return []


@contextlib.contextmanager
def _opened(run_dir: RunDir) -> Iterator[int]:
    """Yield a descriptor of the run directory."""
    if isinstance(run_dir, int):
        yield run_dir
        return
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(run_dir or ".", flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(run_dir: RunDir, name: str) -> bytes:
    """Return the content of a file in the run directory.

    :raises OSError: it is missing, too long for a record, or another user may have written it.
    """
    with _opened(run_dir) as directory:
        descriptor = open_regular(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid != os.geteuid() or others or status.st_nlink != 1:
            raise PermissionError(f"{name} is not a file that only this user can write")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError(errno.EFBIG, "Longer than any record", name)
    return content


def _replace(run_dir: RunDir, name: str, entries: Iterable[tuple[Any, Any]]) -> None:
    with _opened(run_dir) as directory:
        draft = name + "~"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(draft, flags, 0o600, dir_fd=directory), "w", encoding="utf-8") as file:
            json.dump(list(entries), file)
        os.replace(draft, name, src_dir_fd=directory, dst_dir_fd=directory)


def _hex(instance_id: int | str) -> str:
    return f"{instance_id:x}" if isinstance(instance_id, int) else instance_id.lower()


def _append(run_dir: RunDir, entry: dict[str, Any]) -> None:
    """Append one line with one write, so lines of several processes never mix."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _opened(run_dir) as directory:
        descriptor = os.open(LEDGER, flags, 0o600, dir_fd=directory)
    try:
        os.write(descriptor, b"\n" + json.dumps(entry).encode() + b"\n")  # terminates a torn line before this one
    finally:
        os.close(descriptor)
