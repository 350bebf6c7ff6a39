"""Finds and reads flight records for people: clear errors for what is missing, unreadable or of another version."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dynamo_worker.cli.explain.account import account, number
from dynamo_worker.errors import UsageError
from dynamo_worker.supervisor import record_file
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from dynamo_worker.cli.explain.account import Account

#: Bytes of a file that are read; a record is shorter.
_MOST_BYTES = 4 * record_file.MOST_BYTES


def of_file(path: str) -> Account:
    """Return the account of one record.

    :raises UsageError: there is none, it cannot be read, or it is of another version.
    """
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read the flight record {path}: {why}", hint="`--last` finds the last one") from error
    try:
        return _told(path, descriptor)
    finally:
        os.close(descriptor)


def last(directory: str) -> Account:
    """Return the account of the last worker that has ended, or of the last one if all run.

    :param directory: where records are kept.
    :raises UsageError: there is no record.
    """
    try:
        place = record_file.open_directory(directory)
    except OSError as error:
        raise UsageError(
            f"no flight records in {directory}: {error.strerror}",
            hint="--record-dir DIR names another place; the worker must have been started with the same",
        ) from error
    try:
        return _last_in(directory, place)
    finally:
        os.close(place)


def _last_in(directory: str, place: int) -> Account:
    try:
        over, running = record_file.by_life(place)
    except OSError as error:
        raise UsageError(f"cannot read {directory}: {error.strerror}") from error
    name = next(reversed([*running[-1:], *over]), None)
    if name is None:
        raise UsageError(
            f"no flight records in {directory}",
            hint="has a worker run with this --record-dir, and not with --record-keep 0 or --no-supervise?",
        )
    try:
        descriptor = record_file.open_record(place, name)
    except OSError as error:
        raise UsageError(f"cannot read the flight record {directory}/{name}: {error.strerror}") from error
    try:
        return _told(os.path.join(directory, name), descriptor)
    finally:
        os.close(descriptor)


def _told(path: str, descriptor: int) -> Account:
    try:
        data = record_file.read(descriptor, _MOST_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the flight record {path}: {error.strerror}") from error
    found = record_file.entries(data)
    start: dict[str, Any] = next((entry for entry in found if entry["event"] == "start"), {})
    if not start:
        raise UsageError(f"{path} is no flight record, or its beginning is damaged", hint="`--last` finds the last one")
    if start.get("format") != record_file.FORMAT:
        raise UsageError(
            f"{path} has format {int(number(start.get('format')))}; this version reads format {record_file.FORMAT}",
            hint=f"read it with the dynamo-worker that wrote it ({str(start.get('version'))[:40]})",
        )
    return account(path, found, running=record_file.is_locked(descriptor))
