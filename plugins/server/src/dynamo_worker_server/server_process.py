"""The server's processes: starting the command, its last words, who listens on its port, and its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from dynamo_worker.errors import StartError
from dynamo_worker.kit.engine_processes import EngineProcesses, named
from dynamo_worker_server.arguments import HOST, PORT_PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_worker.deadline import Deadline

#: Where free ports are looked for: below those that the kernel gives to outgoing connections, one of which could take
#: the port while the server still loads its model.
_PORTS: Final = range(20_000, 32_768)
_TRIES: Final = 50
#: Bytes and lines of its output that an error quotes.
_KEPT_BYTES: Final = 8_192
_QUOTED_LINES: Final = 8
_QUOTED_CHARACTERS: Final = 200
#: Seconds in which the output of a server that has just ended arrives.
_LAST_WORDS_SECONDS: Final = 1.0
_LISTENING: Final = "0A"


def choose_port(given: int | None) -> int:
    """Return the port for the server: the given one, or one that is free.

    :raises StartError: it is in use.
    """
    if given is not None:
        if not _is_free(given):
            raise StartError(f"port {given} is in use", hint="choose another --server-port, or --attach its server")
        return given
    for port in random.sample(_PORTS, _TRIES):
        if _is_free(port):
            return port
    raise StartError(f"no free port found from {_PORTS.start} to {_PORTS.stop - 1}", hint="name one: --server-port")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections that have ended do not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class ServerProcess:
    """The command, and everything that it starts."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        """Start the command. Its output goes to this process' stderr.

        :param port: replaces ``{port}`` in each word.
        :raises StartError: it cannot be run.
        """
        self.command = [word.replace(PORT_PLACEHOLDER, str(port)) for word in command]
        self.port = port
        #: Pids of the processes without which nothing is served.
        self.vital: list[int] = []
        self._kept = b""
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise StartError(f"cannot run {self.command[0]!r}: {getattr(error, 'strerror', None) or error}") from error
        self.vital.append(self._process.pid)
        assert self._process.stdout is not None
        self._output = threading.Thread(
            target=self._relay, args=(self._process.stdout,), name="server-output", daemon=True
        )
        self._output.start()

    def ended(self) -> str | None:
        """Return how the command has ended, with its last words; None while it runs. Waits for these words."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0:
            how = "has ended with code 0; it has to stay in the foreground"
        elif code > 0:
            how = f"has ended with code {code}"
        else:
            how = f"was killed by {_signal_name(-code)}"
        self._output.join(_LAST_WORDS_SECONDS)
        words = self._last_words()
        return f"{self.command[0]} {how}{'; its last output:' if words else ''}{words}"

    def lost(self) -> str | None:
        """Return which vital process has ended, or None. Reads a file for each."""
        for pid in self.vital:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                return f"process {pid} of the server has ended"
            if stat.rpartition(")")[2].split()[0] in ("X", "Z"):
                return f"process {pid} of the server has ended"
        return None

    @property
    def running(self) -> bool:
        """Whether the command runs."""
        return self._process.poll() is None

    def find_listener(self) -> None:
        """Find the process that listens on the port, and add it to the vital ones. Reads all of /proc.

        :raises StartError: it is none of this server's.
        """
        sockets = _listening_sockets(self.port)
        if not sockets:  # in a network namespace of its own, or gone again
            return
        # The one nearest to the command: others may have inherited its socket, and come and go.
        listener = next((pid for pid in self._tree().pids if sockets & _sockets_of(pid)), None)
        if listener is None:
            raise StartError(
                f"port {self.port} belongs to a process that {self.command[0]} has not started",
                hint="a server in the background or in a container is used with --attach",
            )
        if listener not in self.vital:
            self.vital.append(listener)

    def find_others(self, titles: Sequence[str]) -> None:
        """Find further processes, and add them to the vital ones. Reads all of /proc.

        :param titles: how their command lines begin.
        :raises StartError: there is none with one of them.
        """
        for title in titles:
            found = named(title.encode())
            if not found:
                raise StartError(f"--server-process {title}: the server has no process whose command line begins so")
            self.vital += [pid for pid in found if pid not in self.vital]

    async def end(self, patience: float, deadline: Deadline) -> None:
        """Ask the command to end with SIGTERM, wait, and kill all that is left of it. Idempotent.

        :param patience: seconds that it gets.
        """
        tree = self._tree()
        tree.signal_leaders(signal.SIGTERM)
        await tree.end(patience, deadline)
        self._process.poll()

    def _tree(self) -> EngineProcesses:
        return EngineProcesses(b"", leaders=[self._process.pid])

    def _relay(self, output: IO[bytes]) -> None:
        """Pass the output on, and keep its end; a server whose output nobody reads would stop."""
        with output:
            while data := os.read(output.fileno(), 65_536):
                self._kept = (self._kept + data)[-_KEPT_BYTES:]
                try:
                    sys.stderr.flush()
                    os.write(2, data)
                except (OSError, ValueError):
                    continue

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        quoted = [line[-_QUOTED_CHARACTERS:] for line in lines if line.strip("^~ ")][-_QUOTED_LINES:]
        return "".join(f"\n  {line}" for line in quoted)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def _listening_sockets(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on a port, on any address."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for row in _rows(table):
            if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port:
                found.add(row[9])
    return found


def _rows(table: str) -> Iterable[list[str]]:
    try:
        with open(table, encoding="ascii") as file:
            return [line.split() for line in file][1:]
    except OSError:  # no IPv6
        return []


def _sockets_of(pid: int) -> set[str]:
    found: set[str] = set()
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return found
    for entry in entries:
        with contextlib.suppress(OSError):  # closed meanwhile, as a busy server's are
            target = os.readlink(entry)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found
