"""Logging: events with fields, written to stderr as text or as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any, Final

from dynamo_worker.supervisor.output import Output, writable
from dynamo_worker.supervisor.text import continued, format_value, indented, redacted, without_secrets

#: The names for plugins. Everything else sets up the worker's own processes.
__all__ = ["EventLogger", "get_logger"]

#: Default of ``DYN_LOG`` for the Dynamo runtime: warnings, except uninformative ones (for each client that disconnects,
#: for text-only models, for endpoints that have already left discovery). The target ``request_span`` cannot be
#: silenced: the runtime itself appends ``request_span=trace``. A directive with a field would take precedence, but
#: directives with brackets take a lock on each span.
WORKER_RUNTIME_LOG: Final = (
    "warn,mm_routing=error,tower_http=off,dynamo_runtime::component::endpoint=error,"
    "dynamo_runtime::component::client=off,dynamo_runtime::pipeline::network::ingress::push_handler=off,"
    "dynamo_runtime::pipeline::network::tcp=error"
)
#: Default of ``DYN_LOG`` for a frontend, which also warns about its own watches when it stops, and logs two errors for
#: each invalid request. A request that fails on the server is still logged.
FRONTEND_RUNTIME_LOG: Final = (
    f"{WORKER_RUNTIME_LOG},dynamo_llm::discovery=error,dynamo_runtime::storage::kv=off,"
    "dynamo_runtime::pipeline::network::egress::push_router=error,dynamo_llm::http::service::disconnect=off,"
    "dynamo_llm::http::service::metrics=off,dynamo_llm::http::service::service_v2=off,"
    "tower_http::trace::on_failure=error"
)

#: Length limits for a message or a field, and for a traceback, in characters.
_MOST_CHARACTERS: Final = 8000
_MOST_OF_TRACEBACK: Final = 64 * 1024


class EventLogger:
    """A logger for events: a constant message to search for, and variable data as fields.

    ``log.info("Received shutdown signal", signal="SIGTERM", level=1)``
    """

    __slots__ = ("logger",)

    def __init__(self, name: str) -> None:
        #: The logger of the standard library behind this one.
        self.logger = logging.getLogger(name)

    def debug(self, message: str, /, **fields: Any) -> None:
        """Log internals for developers."""
        self._log(logging.DEBUG, message, None, fields)

    def info(self, message: str, /, **fields: Any) -> None:
        """Log normal operation for operators."""
        self._log(logging.INFO, message, None, fields)

    def warning(self, message: str, /, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Log a problem that does not end the worker."""
        self._log(logging.WARNING, message, exc_info, fields)

    def error(self, message: str, /, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Log a failure."""
        self._log(logging.ERROR, message, exc_info, fields)

    def _log(self, level: int, message: str, exc_info: BaseException | None, fields: Mapping[str, Any]) -> None:
        if self.logger.isEnabledFor(level):
            # With "%s", a percent sign in the message is not a placeholder.
            self.logger.log(level, "%s", message, exc_info=exc_info, stacklevel=3, extra={"fields": fields})


def get_logger(name: str) -> EventLogger:
    """Return the event logger for a module's ``__name__``."""
    return EventLogger(name)


def setup(level: str = "info", log_format: str = "text", stream: IO[str] | UnblockedStream | None = None) -> None:
    """Send all log records of this process to stderr in one format.

    :param level: ``debug``, ``info``, ``warning`` or ``error``.
    :param log_format: ``text`` or ``json``.
    :param stream: where to write instead of stderr.
    """
    formatter = JsonFormatter() if log_format == "json" else TextFormatter()
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(formatter)
    if isinstance(stream, UnblockedStream):
        stream.formatter = formatter
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def quiet_runtime(directives: str = WORKER_RUNTIME_LOG) -> None:
    """Set the default of ``DYN_LOG``. Call this before importing ``dynamo``, which reads it."""
    os.environ.setdefault("DYN_LOG", directives)


def plain_runtime(log_format: str) -> None:
    """Set the runtime's log to JSON if ours is, and without colours unless a terminal shows them.

    Call this before importing ``dynamo``, which reads the variables. Engines and their libraries read ``NO_COLOR``.
    """
    if log_format == "json":
        os.environ.setdefault("DYN_LOGGING_JSONL", "true")
    if log_format == "json" or sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("DYN_SDK_DISABLE_ANSI_LOGGING", "1")
        os.environ.setdefault("NO_COLOR", "1")


class UnblockedStream:
    """A non-blocking replacement for a text stream such as ``sys.stderr``.

    A thread writes what the descriptor does not accept immediately. Lines beyond the buffer's limit are dropped and
    counted.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._descriptor = stream.fileno()
        #: Formats the message about lost lines.
        self.formatter: logging.Formatter = TextFormatter()
        self._begin()
        # The engine may fork while another thread writes or while output is pending.
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        # Reentrant, because a signal handler may log.
        self._lock = threading.RLock()
        self._output = Output(self._descriptor, self._lost)
        self._writer: threading.Thread | None = None

    def write(self, text: str) -> int:
        """Write ``text`` without blocking."""
        with self._lock:
            self._output.write(text.encode("utf-8", "backslashreplace"))
            if self._output.pending and self._writer is None:
                writer = threading.Thread(target=self._write_rest, name="log writer", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread available: the next write retries
                    writer.start()
                    self._writer = writer
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Do nothing: only output that the descriptor does not accept is buffered."""

    def drain(self, seconds: float) -> None:
        """Wait up to ``seconds`` for buffered output to be written."""
        with self._lock:
            self._output.drain(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write_rest(self) -> None:
        while True:
            writable(self._descriptor, 60)
            with self._lock:
                self._output.flush()
                if not self._output.pending:
                    self._writer = None
                    return
            time.sleep(0.01)  # poll reports writable even if a whole line does not fit

    def _lost(self, lines: int) -> bytes:
        message = "Log lines lost: the reader is not keeping up"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (), None)
        record.fields = {"lines": lines}
        return f"{self.formatter.format(record)}\n".encode("utf-8", "backslashreplace")


class TextFormatter(logging.Formatter):
    """One line for people: ``2026-11-21T01:02:03.456Z INFO dynamo_worker.host.launcher: message key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        line = (
            f"{_timestamp(record)} {record.levelname} {record.name}: {continued(record.getMessage(), _MOST_CHARACTERS)}"
        )
        for name, value in _fields(record).items():
            line += f" {name}={format_value(value, name, _MOST_CHARACTERS)}"
        traceback = _traceback(self, record)
        return f"{line}\n{indented(traceback, _MOST_OF_TRACEBACK)}" if traceback else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, the fields and ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object; a field never hides one of the standard keys."""
        event: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage(), _MOST_CHARACTERS),
        }
        traceback = _traceback(self, record)
        if traceback:
            event["exception"] = redacted(traceback, _MOST_OF_TRACEBACK)
        for name, value in _fields(record).items():
            event[f"{name}_" if name in event else name] = without_secrets(name, value, _MOST_CHARACTERS)
        return json.dumps(event)


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
