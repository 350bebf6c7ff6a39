"""What the command lines of engines have in common: flags that are read by code that may not be there."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import StartError
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from dynamo_worker.engine import EngineContext

log = get_logger(__name__)


class EarlyParser(argparse.ArgumentParser):
    """Reads some of an engine's flags before the engine's own parser can: for the hook ``prepare``."""

    def __init__(self) -> None:
        super().__init__(add_help=False, exit_on_error=False)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """Return the values; None if they are wrong, which the engine's own parser will say."""
        try:
            return self.parse_known_args(arguments)[0]
        except (argparse.ArgumentError, SystemExit):
            return None


def refuse_without_effect(
    args: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], object], names: Iterable[str], why: str
) -> None:
    """Refuse flags that an engine's parser accepts and nobody reads in a worker: who sets one relies on it.

    :param add_flags: adds the engine's flags to a parser; their defaults are what nobody has set.
    :param names: of the flags' values. Those that this version of the engine does not have, do not count.
    :param why: completes "--flag has no effect in a worker: ".
    :raises StartError: naming the flags that are set.
    """
    defaults = argparse.ArgumentParser(add_help=False)
    add_flags(defaults)
    given = [name for name in names if hasattr(args, name) and getattr(args, name) != defaults.get_default(name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise StartError(
            f"{flags} {'has' if len(given) == 1 else 'have'} no effect in a worker: {why}", hint="leave it out"
        )


def import_engine(module: str, *, name: str, install: str) -> Any:
    """Import and return a module of an engine's own package.

    :param module: such as ``vllm.engine.arg_utils``.
    :param name: the engine's name in messages.
    :param install: the command that installs it.
    :raises StartError: the package, or one that it needs, is not installed, or the installation is broken.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise StartError(
            f"the {name} engine needs the Python package {error.name!r}, which is not installed", hint=install
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise StartError(
            f"{name} cannot be imported: {error}", hint=f"`python -c 'import {package}'` shows the whole error"
        ) from error


def add_publish_kv_events(group: argparse._ArgumentGroup) -> None:
    """Add ``--publish-kv-events`` to an engine that has ``--kv-events-config`` of its own."""
    group.add_argument(
        "--publish-kv-events",
        action="store_true",
        help="tell routers which prefixes the KV cache holds, over a port of its own; --kv-events-config does too",
    )


def drop_unread_events(args: argparse.Namespace, context: EngineContext) -> None:
    """Take ``--publish-kv-events`` back where no router would read them: they tell of the tokens of prompts."""
    if args.publish_kv_events and not context.events_wanted:
        log.warning("KV events are not published: the router of --frontend does not read them", next="--router-mode kv")
        args.publish_kv_events = False


def kv_events_socket(private_dir: Path) -> str:
    """Return the ZMQ address for the KV events of an engine on this machine: a socket file for each rank.

    Engines number the addresses of their ranks. Of a file they refuse to (vLLM 0.31, SGLang 0.5.21), unless its name
    says ``inproc``: then they append the number. A port would be open to every user of this machine.
    """
    return f"ipc://{private_dir}/kv-events-inproc"
