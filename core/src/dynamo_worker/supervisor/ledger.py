"""What has to be taken back when the worker is gone: written before it is done, read by whoever cleans up.

``ledger.jsonl`` (registrations and the frontend, appended by the worker), ``segments.json`` (shared memory) and
``processes.json`` (both rewritten by the guardian) in the run directory. The worker imports this module too.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from collections.abc import Iterable

_LEDGER = "ledger.jsonl"
_SEGMENTS = "segments.json"
_PROCESSES = "processes.json"


def record_registration(run_dir: str | os.PathLike[str], backend: str, instance_id: int | str, **where: Any) -> None:
    """Record a registration with a discovery service, *before* it is made.

    :param run_dir: the run directory, ``$DYNAMO_WORKER_RUN_DIR``.
    :param backend: ``file``, ``etcd``, ``kubernetes`` or ``mem``.
    :param instance_id: the Dynamo instance id, as a number or in hexadecimal digits.
    :param where: ``root=`` of the ``file`` backend; ``endpoints=[…]`` (URLs) and, if it is not the instance id,
        ``lease=`` of the ``etcd`` backend.
    """
    if "root" in where:
        where["root"] = os.path.abspath(where["root"])
    _append(run_dir, {"kind": "registration", "backend": backend, "instance": _hex(instance_id), **where})


def registrations(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the recorded registrations. A torn or foreign line is skipped."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(run_dir, "registration"):
        if "instance" in entry:
            found[f"{entry.get('backend')}/{entry['instance']}"] = entry
    return list(found.values())


def record_frontend(run_dir: str | os.PathLike[str], process: Process, seconds: float) -> None:
    """Record the frontend beside the worker.

    :param seconds: how long it may outlive the worker for the streams that it carries.
    """
    _append(run_dir, {"kind": "frontend", "pid": process.pid, "start": process.start, "seconds": seconds})


def frontend(run_dir: str | os.PathLike[str]) -> tuple[Process, float] | None:
    """Return the recorded frontend and how long it may outlive the worker, or None if there was none."""
    entries = _entries(run_dir, "frontend")
    try:
        entry = entries[-1]
        return Process(int(entry["pid"]), int(entry["start"])), float(entry["seconds"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _entries(run_dir: str | os.PathLike[str], kind: str) -> list[dict[str, Any]]:
    """Return what the ledger holds of one kind. A torn or foreign line is skipped."""
    try:
        with open(os.path.join(run_dir, _LEDGER), "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("kind") == kind:
            entries.append(entry)
    return entries


def write_segments(run_dir: str | os.PathLike[str], segments: Iterable[tuple[str, int]]) -> None:
    """Replace the record of shared-memory segments: names under ``/dev/shm``, each with its inode."""
    _replace(run_dir, _SEGMENTS, segments)


def read_segments(run_dir: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Return the recorded shared-memory segments; none if there is no legible record."""
    try:
        with open(os.path.join(run_dir, _SEGMENTS), encoding="utf-8") as file:
            return [(str(name), int(inode)) for name, inode in json.load(file)]
    except (OSError, ValueError, TypeError):
        return []


def write_processes(run_dir: str | os.PathLike[str], processes: Iterable[tuple[int, int]]) -> None:
    """Replace the record of the tree's processes: pids, each with its start time."""
    _replace(run_dir, _PROCESSES, processes)


def read_processes(run_dir: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Return the recorded processes; none if there is no legible record."""
    try:
        with open(os.path.join(run_dir, _PROCESSES), encoding="utf-8") as file:
            return [(int(pid), int(start)) for pid, start in json.load(file)]
    except (OSError, ValueError, TypeError):
        return []


def _replace(run_dir: str | os.PathLike[str], name: str, entries: Iterable[tuple[Any, Any]]) -> None:
    path = os.path.join(run_dir, name)
    with open(path + "~", "w", encoding="utf-8") as file:
        json.dump(list(entries), file)
    os.replace(path + "~", path)


def _hex(instance_id: int | str) -> str:
    return f"{instance_id:x}" if isinstance(instance_id, int) else instance_id.lower()


def _append(run_dir: str | os.PathLike[str], entry: dict[str, Any]) -> None:
    """Append one line with one write, so that lines of several processes never mix."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(os.path.join(run_dir, _LEDGER), flags, 0o600)
    try:
        os.write(descriptor, b"\n" + json.dumps(entry).encode() + b"\n")  # a torn line before this one ends here
    finally:
        os.close(descriptor)
