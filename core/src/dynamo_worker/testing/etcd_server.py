"""A real etcd server for tests: it can be stopped, killed, restarted and emptied."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor.etcd import Gateway
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: All that Dynamo writes: from v1/ up to, but not including, v10.
_ALL = {"key": base64.b64encode(b"v1/").decode(), "range_end": base64.b64encode(b"v10").decode()}


class Etcd:
    """One etcd server, which needs the program ``etcd`` on the PATH.

    :param directory: for its data; its log is beside it.
    :param environment: of its process.
    :param scheme: ``https`` for a server with TLS, which ``arguments`` configure.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, scheme: str = "http", arguments: Sequence[str] = ()
    ) -> None:
        self.url = f"{scheme}://127.0.0.1:{free_port()}"
        self._gateway = Gateway([self.url], 5.0)
        self._directory = directory
        self._log = directory.with_suffix(".log")
        self._environment = environment
        peers = f"http://127.0.0.1:{free_port()}"
        self._command = ["etcd", "--data-dir", str(directory), "--listen-client-urls", self.url]
        self._command += ["--advertise-client-urls", self.url, "--listen-peer-urls", peers]
        self._command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}", *arguments]
        self.start()

    def start(self) -> None:
        """Start the server, with the data that it has, and wait until it answers."""
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._answers, 20, "etcd")

    def pause(self) -> None:
        """Stop the server: it accepts connections and does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a stopped server go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server."""
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Remove the data of a dead server."""
        shutil.rmtree(self._directory)

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Call the gateway as the environment of this process says."""
        return self._gateway.call(path, body)

    def _answers(self) -> bool:
        # Whoever answers at the address of a server that has ended is another's: none may be taken for this one.
        assert self.process.poll() is None, (
            f"etcd ended with {self.process.returncode}: {self._log.read_text()[-2000:]}"
        )
        try:
            self.call("/v3/kv/range", _ALL)
        except OSError as error:
            return "user name is empty" in str(error) or "404" in str(error)
        return True

    def keys(self) -> str:
        """Return everything that stands below v1/ as etcd prints it: base64 keys, good enough to count."""
        return json.dumps(self.call("/v3/kv/range", {**_ALL, "keys_only": True}), separators=(",", ":"))

    def empty(self) -> bool:
        """Return whether there is nothing below v1/."""
        return '"kvs"' not in self.keys()

    def entries(self) -> list[str]:
        """Return the keys of everything below v1/.

        :raises OSError: it does not answer.
        """
        found = self.call("/v3/kv/range", {**_ALL, "keys_only": True}).get("kvs", ())
        return [base64.b64decode(entry["key"]).decode(errors="replace") for entry in found]

    def workers(self) -> int:
        """Return the number of registered endpoints."""
        return sum(key.startswith("v1/instances/") for key in self.entries())

    def delete(self, key: str) -> None:
        """Delete one entry."""
        self.call("/v3/kv/deleterange", {"key": base64.b64encode(key.encode()).decode()})

    def delete_all(self) -> None:
        """Delete everything below v1/."""
        self.call("/v3/kv/deleterange", _ALL)
