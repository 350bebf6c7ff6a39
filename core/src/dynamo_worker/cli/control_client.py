"""What the commands that operate a running worker share: the call of its control routes, and their arguments."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dynamo_worker.address import LOOPBACK, Address
from dynamo_worker.errors import UsageError, WorkerError, for_client
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.host.status.control_routes import TOKEN_ENV, read_token

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Seconds for a worker to answer; it gives discovery 10.
_TIMEOUT: Final = 20.0
#: Longest answer in bytes.
_MOST_BYTES: Final = 1 << 20
_TOKEN_FILE: Final = BY_NAME["control_token_file"]


@dataclass(frozen=True)
class Report:
    """A worker's answer about its drain.

    :param phase: where it is between service and drained.
    :param in_flight: the number of requests in flight.
    :param in_discovery: whether it may still be in discovery.
    :param engine_paused: whether the engine itself keeps the worker out of discovery.
    :param mode: what happens to requests in flight; None while no drain is in progress.
    :param left_s: seconds until those that are left are ended.
    """

    phase: DrainPhase
    in_flight: int
    in_discovery: bool
    engine_paused: bool
    mode: DrainMode | None
    left_s: float

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Report:
        """Return the report in an answer.

        :raises ValueError: it contains none.
        """
        try:
            return cls(
                DrainPhase(answer["phase"]),
                int(answer["in_flight"]),
                bool(answer["in_discovery"]),
                bool(answer["engine_paused"]),
                DrainMode(answer["mode"]) if "mode" in answer else None,
                float(answer.get("left_s", 0.0)),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error

    @property
    def requests(self) -> str:
        """The number of requests in flight, in words."""
        return f"{self.in_flight} request{'' if self.in_flight == 1 else 's'} in flight"


class ControlClient:
    """Calls the control routes of one worker."""

    def __init__(self, address: Address, token: str | None) -> None:
        self.address = address
        self._token = token

    def call(self, route: str, body: Mapping[str, Any] | None = None) -> tuple[Report, dict[str, Any]]:
        """Call one route; return the report, and the whole answer.

        :raises UsageError: the worker does not let us.
        :raises WorkerError: it cannot be reached, refuses, or is something else.
        """
        status, answer = self._post(f"/engine/{route}", body or {})
        message = for_client(str(answer.get("message", "")))
        if status == 401:
            known = "does not accept this control token" if self._token else "requires its control token"
            raise UsageError(
                f"{self.address}: the worker {known}",
                hint=f"give the worker's own with {_TOKEN_FILE.flag} FILE or {TOKEN_ENV}",
            )
        if status == 403:
            raise UsageError(f"{self.address}: the worker refuses: {message}")
        if status == 503 and answer.get("state"):
            raise WorkerError(f"{self.address}: the worker is not serving, its state is {answer['state']}")
        if status != 200:
            raise WorkerError(
                f"{self.address}: expected a worker that can be drained, got HTTP {status}{message and f': {message}'}",
                hint=f"use the status port ({BY_NAME['system_port'].flag}) of a dynamo-worker with these routes",
            )
        if answer.get("status") != "success":
            raise WorkerError(f"{self.address}: the worker refuses: {message or 'no reason given'}")
        try:
            return Report.parse(answer), answer
        except ValueError as error:
            raise self._stranger(f"its answer lacks a report: {error}") from error

    def _post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        headers = {"content-type": "application/json"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        connection = HTTPConnection(self.address.host, self.address.port, timeout=_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read(_MOST_BYTES))
        except (OSError, UnicodeError) as error:
            reason = "it does not answer" if isinstance(error, TimeoutError) else _reason(error)
            raise WorkerError(
                f"{self.address}: the worker cannot be reached: {reason}",
                hint=f"is it running, and is this the address of its status server ({BY_NAME['system_port'].flag})?",
            ) from error
        except (HTTPException, ValueError) as error:
            raise self._stranger(f"its answer is not JSON over HTTP: {error!r:.80}") from error
        finally:
            connection.close()
        return response.status, answer if isinstance(answer, dict) else {}

    def _stranger(self, why: str) -> WorkerError:
        return WorkerError(
            f"{self.address}: this is not the status server of a worker: {why}",
            hint=f"use the port of {BY_NAME['system_port'].flag}",
        )


def _reason(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class CommandParser(argparse.ArgumentParser):
    """The parser of a command that operates the worker at an address."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "address",
            type=_address,
            metavar="HOST:PORT",
            help="address of the worker's status server (--system-port); a port alone is on this machine",
        )

    def add_common(self) -> None:
        """Add the flags that all commands of this kind have."""
        self.add_argument(
            _TOKEN_FILE.flag,
            type=Path,
            default=os.environ.get(_TOKEN_FILE.env) or None,
            metavar=_TOKEN_FILE.metavar,
            help=f"file with the worker's control token, if it requires one [env: {_TOKEN_FILE.env}]; "
            f"{TOKEN_ENV} can hold the token itself",
        )
        self.add_argument("--json", action="store_true", help="print the worker's last answer as JSON")

    def client(self, arguments: argparse.Namespace) -> ControlClient:
        """Return the client for parsed arguments.

        :raises UsageError: the token cannot be read.
        """
        file = arguments.control_token_file
        return ControlClient(arguments.address, read_token(None if file is None else Path(file)))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(message, hint=f"`{self.prog} --help` shows how")


def _address(text: str) -> Address:
    try:
        return Address.parse(text, f"{LOOPBACK}:")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None
