"""The flags of the server engine, and what they say."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from dynamo_worker.errors import UsageError, shown
from dynamo_worker.kit.engine_arguments import non_negative, served_names

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Replaced in every word of the command.
PORT_PLACEHOLDER: Final = "{port}"
#: Where a server that this worker starts listens.
HOST: Final = "127.0.0.1"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_API: Final = "/v1"
#: Characters of a token, and of the file that holds it.
_TOKEN_CHARACTERS: Final = 16_384


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags and the command."""
    group = parser.add_argument_group(
        "server engine",
        "Runs an OpenAI-compatible server: dynamo-worker --engine server [FLAG …] -- COMMAND …, "
        f"where {PORT_PLACEHOLDER} in COMMAND is the port to listen on.",
    )
    group.add_argument("--attach", metavar="URL", help="use a server that already runs, instead of COMMAND")
    group.add_argument(
        "--server-command",
        metavar="COMMAND",
        help="COMMAND in one word, quoted as for a shell, as in a configuration file; no shell runs it",
    )
    group.add_argument(
        "--server-port",
        type=_port,
        metavar="PORT",
        help=f"port that COMMAND listens on (default: a free one, for {PORT_PLACEHOLDER} in COMMAND)",
    )
    group.add_argument(
        "--server-model", metavar="ID", help="the server's model to serve (default: all that /v1/models lists)"
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME[,NAME…]",
        help="names that clients ask for the model by (default: the server's own)",
    )
    group.add_argument(
        "--server-health-path",
        type=_path,
        metavar="PATH",
        help="what answers 200 when the server is ready (default: /health, or /v1/models if there is none)",
    )
    group.add_argument(
        "--server-process",
        action="append",
        default=[],
        metavar="TITLE",
        help="beginning of the command line of a further process that must live, such as VLLM::EngineCore; "
        "may be given several times (default: COMMAND and the process that listens on the port)",
    )
    group.add_argument(
        "--server-start-timeout",
        type=non_negative,
        default=1800.0,
        metavar="S",
        help="seconds until the server must be ready (default: 1800)",
    )
    group.add_argument(
        "--server-stop-timeout",
        type=non_negative,
        default=5.0,
        metavar="S",
        help="seconds from SIGTERM until COMMAND and all that it has started are killed (default: 5)",
    )
    token = group.add_mutually_exclusive_group()
    token.add_argument("--server-token-env", metavar="NAME", help="environment variable with the server's API key")
    token.add_argument("--server-token-file", type=Path, metavar="FILE", help="file with the server's API key")
    group.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the server and its arguments")


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text}")
    return port


def _path(text: str) -> str:
    if not text.startswith("/") or not text.isascii() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"expected a path such as /health, got {shown(text)}")
    return text


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    :param prefix: what comes before ``/v1`` in its paths.
    """

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """Read the value of ``--attach``; a trailing ``/v1`` is no part of the prefix.

        :raises UsageError: it is no address of a server, or holds a password.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"--attach: {error}") from None
        if parts.username is not None or parts.password is not None:
            raise UsageError(
                "--attach: the address holds a password, which every user of this machine can read",
                hint="use --server-token-env or --server-token-file",
            )
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.query or parts.fragment or port == 0:
            raise UsageError(f"--attach: expected http://HOST:PORT or https://HOST, got {shown(url)}")
        prefix = parts.path.rstrip("/").removesuffix(_API)
        if prefix:
            _checked(prefix)
        return cls(parts.hostname, port or _DEFAULT_PORTS[parts.scheme], parts.scheme == "https", prefix)

    @property
    def authority(self) -> str:
        """The value of the header ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


def _checked(prefix: str) -> None:
    try:
        _path(prefix)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--attach: {error}") from None


@dataclass(frozen=True)
class Settings:
    """What the flags say.

    :param command: the server to start; empty with ``attach``.
    :param attach: the server to use.
    :param port: the port that ``command`` has been given; None for a free one.
    :param names: the names of the model for clients, the main one first; empty for the server's own.
    :param model: the server's model; None for all.
    :param titles: how the command lines of further processes begin that must live.
    """

    command: tuple[str, ...]
    attach: Address | None
    port: int | None
    names: tuple[str, ...]
    model: str | None
    health_path: str | None
    titles: tuple[str, ...]
    start_seconds: float
    stop_seconds: float
    token_variable: str | None
    token_file: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Read the flags.

        :raises UsageError: they contradict each other, or say too little.
        """
        command = _command(args)
        attach = None if args.attach is None else Address.of(args.attach)
        if attach is None:
            _check_command(command, args.server_port)
        elif command:
            raise UsageError("--attach uses a server that already runs; expected no COMMAND", hint="leave one out")
        elif args.server_port is not None or args.server_process:
            flag = "--server-process" if args.server_process else "--server-port"
            raise UsageError(f"{flag} is for a COMMAND; --attach uses a server that already runs")
        return cls(
            command,
            attach,
            args.server_port,
            tuple(served_names(args.served_model_name)),
            args.server_model,
            args.server_health_path,
            tuple(args.server_process),
            args.server_start_timeout,
            args.server_stop_timeout,
            args.server_token_env,
            args.server_token_file,
        )

    def token(self) -> str | None:
        """Return the server's API key, which may change: orchestrators rotate such files. Reads a file.

        :raises UsageError: there is none, or it is no token.
        """
        if self.token_variable is not None:
            where, text = f"${self.token_variable}", os.environ.get(self.token_variable, "")
        elif self.token_file is not None:
            where = str(self.token_file)
            try:
                with self.token_file.open(encoding="ascii") as file:
                    text = file.read(_TOKEN_CHARACTERS + 1)
            except (OSError, ValueError) as error:
                raise UsageError(f"--server-token-file {where}: {getattr(error, 'strerror', None) or error}") from None
        else:
            return None
        text = text.strip()
        if not text or len(text) > _TOKEN_CHARACTERS or not (text.isascii() and text.isprintable()) or " " in text:
            raise UsageError(f"{where}: expected an API key, which is one word of printable ASCII characters")
        return text


def _command(args: argparse.Namespace) -> tuple[str, ...]:
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.server_command is None:
        return tuple(words)
    if words:
        raise UsageError("COMMAND is given twice: as --server-command and at the end", hint="leave one out")
    try:
        return tuple(shlex.split(args.server_command))
    except ValueError as error:
        raise UsageError(f"--server-command: {error}") from None


def _check_command(command: Sequence[str], port: int | None) -> None:
    if not command:
        raise UsageError(
            "the server engine needs a COMMAND or --attach URL",
            hint=f"dynamo-worker --engine server -- llama-server -m model.gguf --port {PORT_PLACEHOLDER}",
        )
    if port is None and not any(PORT_PLACEHOLDER in word for word in command):
        raise UsageError(
            f"nothing tells COMMAND on which port to listen: it has no {PORT_PLACEHOLDER}",
            hint=f"write {PORT_PLACEHOLDER} where its port belongs, or name the port it uses with --server-port",
        )
