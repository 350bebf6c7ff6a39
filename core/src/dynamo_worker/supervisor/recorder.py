"""The flight recorder: a bounded record of one worker's life, kept outside of the worker.

The supervisor writes it as things happen. If the supervisor dies, the guardian completes it; if both die, the next
start does. A record that cannot be written never disturbs the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

import dynamo_worker
from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.record_file import FORMAT, RecordFile, default_directory
from dynamo_worker.supervisor.text import safe, without_secrets
from dynamo_worker.supervisor.verdict import signal_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.supervisor.early_settings import EarlySettings
    from dynamo_worker.supervisor.report import Log

#: How many records are kept if nothing else is chosen, and the most that can be.
DEFAULT_KEEP: Final = 20
MOST_KEPT: Final = 1000

#: The exit code that the caller of a supervisor sees that was killed.
CODE_OF_A_KILL: Final = 137

#: Entries that the worker causes: at once, and per second. A library may write anything to the socket.
_BURST, _RATE = 200, 20.0

#: Characters of a text, and entries of a list or a mapping.
_MOST_CHARACTERS, _MOST_ITEMS = 600, 16

#: The messages of the worker that become entries, with the fields that are recorded.
_RECORDED: Final = {
    "settings": ("engine", "drain", "plan"),
    "plan": ("drain", "plan"),
    "ready": ("model", "instance", "seconds"),
    "step": ("name", "seconds", "error"),
    "hook": ("hook", "plugin", "seconds", "error"),
    "death": ("what", "pid", "signal", "exit_code"),
    "state": ("state", "in_flight", "counts", "drain", "reason"),
    "exit": ("code", "reason", "error", "counts", "in_flight"),
}

#: The messages of which the last one counts, with what is taken from it for the next sample.
_SAMPLED: Final = {
    "heartbeat": ("in_flight", "counts", "lag", "chunks"),
    "health": ("rounds", "failed", "longest"),
}

#: The file in the run directory that says where the record is.
_REFERENCE: Final = "record"


class Recorder:
    """Writes the record of one worker, or nothing if there is none.

    :param started: when the supervisor started (monotonic).
    """

    def __init__(self, started: float, log: Log) -> None:
        self._started = started
        self._log = log
        self._file: RecordFile | None = None
        self._path = ""
        self._writing = False
        self._failed = False
        #: Whether the supervisor may have replaced the file since we opened it.
        self._shared = False
        self._of_worker, self._of_notes = _Allowance(started), _Allowance(started)
        #: What the worker has last said of itself.
        self.latest: dict[str, Any] = {}

    def open(self, settings: EarlySettings) -> None:
        """Create the record where the settings say; without a place for it there is one log line, and no record."""
        chosen = settings.get("record_dir", "")
        try:
            keep = int(settings.get("record_keep", str(DEFAULT_KEEP)))
        except ValueError:  # the worker refuses it
            keep = DEFAULT_KEEP
        if keep <= 0:
            return
        path = chosen or default_directory(os.environ)
        try:
            if path is None:
                raise FileNotFoundError("there is no home directory")
            self._file = RecordFile.create(path, min(keep, MOST_KEPT))
        except (OSError, ValueError) as error:
            reason = f"{path}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
            tell = self._log.warning if chosen else self._log.info
            tell("No flight record", reason=reason, next="--record-dir DIR, or --record-keep 0 for none")
            return
        self._path = os.path.abspath(path)
        self._log.tap = self.note
        stat = linux.read_stat(os.getpid())
        self.write(
            "start",
            format=FORMAT,
            time=round(time.time() - (time.monotonic() - self._started), 3),
            version=dynamo_worker.__version__,
            host=os.uname().nodename,
            pid=os.getpid(),
            process_start=stat.start if stat is not None else 0,
            pid_space=linux.pid_space(),
        )

    @property
    def active(self) -> bool:
        """Whether there is a record."""
        return self._file is not None

    def refer(self, run_directory: int) -> None:
        """Note in the run directory where the record is, for the next start after a death of all owners.

        :param run_directory: its descriptor.
        """
        if self._file is None:
            return
        text = json.dumps({"directory": self._path, "name": self._file.name}).encode()
        with contextlib.suppress(OSError):  # full: the record will lack what the next start cleans up
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(_REFERENCE, flags, 0o600, dir_fd=run_directory)
            try:
                os.write(descriptor, text)
            finally:
                os.close(descriptor)

    def become_guardians(self, log: Log) -> None:
        """Write for the guardian from now on: its notes, and the end if the supervisor dies."""
        self._log = log
        self._shared = True
        if self._file is not None:
            log.tap = self.note

    # -- Entries ------------------------------------------------------------------------------------------------------

    def write(self, event: str, **fields: Any) -> None:
        """Write one entry; a failure is logged once and never raised."""
        if self._file is None or self._writing:
            return
        self._writing = True
        try:
            if self._shared:
                self._file.take_over()
            self._file.append({"t": round(time.monotonic() - self._started, 3), "event": event, **fields})
        except (OSError, ValueError, TypeError) as error:
            if not self._failed:
                self._failed = True
                reason = error.strerror if isinstance(error, OSError) else str(error)
                self._log.warning("Flight record incomplete", path=self._path, reason=reason)
        finally:
            self._writing = False

    def note(self, level: str, message: str, fields: Mapping[str, Any]) -> None:
        """Record a log line."""
        if self._of_notes.take():
            shown = {name: without_secrets(name, value, _MOST_CHARACTERS) for name, value in fields.items()}
            self.write("note", level=level, message=safe(message, _MOST_CHARACTERS), fields=shown)

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Record one message of the worker, if it is of a kind that is recorded.

        :param now: when it came (monotonic).
        """
        kind = message["type"]
        if kind in _SAMPLED:
            self.latest |= _checked(message, _SAMPLED[kind])
            self.latest["at"] = now
        elif kind in _RECORDED and self._file is not None and self._of_worker.take():
            fields = _checked(message, _RECORDED[kind])
            if kind in ("state", "exit"):
                self.latest |= {name: fields[name] for name in ("in_flight", "counts") if name in fields}
                self.latest["at"] = now
            deadline = message.get("deadline")
            if kind == "state" and isinstance(deadline, (int, float)) and abs(deadline - now) < 1e7:
                fields["deadline_in"] = round(deadline - now, 3)
            self.write(kind, **fields)

    def sample(self, **measured: Any) -> None:
        """Record what the worker has last said of itself, and what was measured."""
        if self._file is not None:
            said = {name: value for name, value in self.latest.items() if name != "at"}
            if "at" in self.latest:
                said["age"] = round(time.monotonic() - self.latest["at"], 3)
            self.write("sample", **said, **measured)

    def end(self, code: int, kind: ExitKind, reason: str, **fields: Any) -> None:
        """Record the end."""
        suppressed = self._of_worker.suppressed + self._of_notes.suppressed
        if suppressed:
            self.write("suppressed", entries=suppressed)
        self.write("end", code=code, kind=kind.value, reason=safe(reason, _MOST_CHARACTERS), **_checked(fields, fields))

    def death(self, what: str, pid: int, code: int | None) -> None:
        """Record the death of one of our processes.

        :param code: its exit code; negative: minus the signal; None if only its parent could know.
        """
        how: dict[str, Any] = {}
        if code is not None:
            how = {"exit_code": code} if code >= 0 else {"signal": signal_name(-code)}
        self.write("death", what=what, pid=pid, **how)

    def end_without_supervisor(
        self,
        cleaned: Mapping[str, Any],
        supervisor: int,
        worker: tuple[int | None, int | None],
        *,
        while_cleaning: bool,
    ) -> None:
        """Complete the record in the guardian, unless the supervisor has.

        :param cleaned: the report of the cleaning.
        :param supervisor: pid of the supervisor.
        :param worker: pid and exit code of the worker.
        :param while_cleaning: whether the worker had ended before its supervisor did.
        """
        if self._file is None:
            return
        self.write("cleaned", by="guardian", **cleaned_fields(cleaned))
        with contextlib.suppress(OSError):
            if any(entry["event"] == "end" for entry in self._file.entries()):
                return
        self.death("supervisor", supervisor, None)
        pid, code = worker
        if pid is not None:
            self.death("worker", pid, code)
        when = " after the worker had ended" if while_cleaning else "; the guardian ended the worker"
        self.end(CODE_OF_A_KILL, ExitKind.SUPERVISOR_KILLED, f"the supervisor was killed{when}", by="guardian")

    def close(self) -> None:
        """Release the record."""
        self._log.tap = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _Allowance:
    """How many entries of one origin may still be written.

    :param now: monotonic time.
    """

    def __init__(self, now: float) -> None:
        self._left, self._counted_at = float(_BURST), now
        #: Entries that were not written.
        self.suppressed = 0

    def take(self) -> bool:
        """Return whether one more entry may be written."""
        now = time.monotonic()
        self._left = min(_BURST, self._left + (now - self._counted_at) * _RATE)
        self._counted_at = now
        if self._left < 1:
            self.suppressed += 1
            return False
        self._left -= 1
        return True


def reference(run_directory: int) -> tuple[str, str] | None:
    """Return the directory and the name of the record of a run directory, or None.

    :param run_directory: its descriptor; nobody else can write there.
    """
    try:
        descriptor = os.open(_REFERENCE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=run_directory)
        try:
            text = json.loads(os.read(descriptor, 8192))
        finally:
            os.close(descriptor)
        return str(text["directory"]), str(text["name"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def complete(where: tuple[str, str], cleaned: Mapping[str, Any]) -> None:
    """Complete the record of a worker whose supervisor and guardian were killed at once.

    :param where: see ``reference``.
    :param cleaned: the report of the cleaning.
    :raises OSError: the record is gone or cannot be written.
    """
    file = RecordFile.reopen(*where)
    try:
        found = file.entries()
        start = next((entry.get("time") for entry in found if entry["event"] == "start"), None)
        at = round(time.time() - start, 3) if isinstance(start, (int, float)) else 0.0
        file.append({"t": at, "event": "cleaned", "by": "next start", **cleaned_fields(cleaned)})
        if not any(entry["event"] == "end" for entry in found):
            end = {
                "code": CODE_OF_A_KILL,
                "kind": ExitKind.ALL_KILLED.value,
                "reason": "supervisor and guardian were killed at once, or the machine went down",
                "by": "next start",
            }
            file.append({"t": at, "event": "end", **end})
    finally:
        file.close()


def cleaned_fields(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says of a cleaning."""
    names = ("processes", "killed", "segments", "withdrawn", "gpu", "unkillable", "frontend", "seconds", "gone_after")
    return _checked(report, names)


def _checked(message: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """Return the fields of these names, with bounded values of simple types."""
    return {name: _bounded(message[name]) for name in names if message.get(name) is not None}


def _bounded(value: object, depth: int = 2) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        number = value if abs(value) < 1 << 53 else 0
        return round(number, 4) if isinstance(number, float) else number
    if isinstance(value, str):
        return safe(value, _MOST_CHARACTERS)
    if isinstance(value, dict) and depth:
        items = list(value.items())[:_MOST_ITEMS]
        return {safe(str(name), 40): _bounded(inner, depth - 1) for name, inner in items}
    if isinstance(value, (list, tuple)) and depth:
        return [_bounded(inner, depth - 1) for inner in value[:_MOST_ITEMS]]
    return None
