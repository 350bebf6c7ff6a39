"""Flags, checks and settings that the command lines of several engines share."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from typing import TYPE_CHECKING, Any

from dynamo_worker.errors import StartError
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from dynamo_worker.engine import EngineContext

log = get_logger(__name__)

_ENCODE = {"encode": "this plugin serves models that generate text"}


class EarlyParser(argparse.ArgumentParser):
    """Reads some of an engine's flags before the engine's own parser is imported, for the hook ``prepare``."""

    def __init__(self) -> None:
        super().__init__(add_help=False, exit_on_error=False)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """Return the values, or None if they are wrong; the engine's own parser reports that later."""
        try:
            return self.parse_known_args(arguments)[0]
        except (argparse.ArgumentError, SystemExit):
            return None


def refuse_without_effect(
    args: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], object], names: Iterable[str], why: str
) -> None:
    """Refuse flags that the engine's parser accepts but nothing in a worker reads.

    :param add_flags: adds the engine's flags, with their defaults, to a parser.
    :param names: the flags' names in ``args``; those that this version of the engine lacks are ignored.
    :param why: completes "--flag has no effect in a worker: ".
    :raises StartError: some are set; the message names them.
    """
    defaults = argparse.ArgumentParser(add_help=False)
    add_flags(defaults)
    given = [name for name in names if hasattr(args, name) and getattr(args, name) != defaults.get_default(name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        has, it = ("has", "it") if len(given) == 1 else ("have", "them")
        raise StartError(f"{flags} {has} no effect in a worker: {why}", hint=f"leave {it} out")


def import_engine(module: str, *, name: str, install: str) -> Any:
    """Import and return a module of an engine's own package.

    :param module: such as ``vllm.engine.arg_utils``.
    :param name: the engine's name in messages.
    :param install: the command that installs it.
    :raises StartError: the package or one of its dependencies is missing or broken.
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
            f"{name} cannot be imported: {error}", hint=f"run `python -c 'import {package}'` for the full traceback"
        ) from error


def add_publish_kv_events(group: argparse._ArgumentGroup) -> None:
    """Add ``--publish-kv-events``, for an engine that also has its own ``--kv-events-config``."""
    group.add_argument(
        "--publish-kv-events",
        action="store_true",
        help="tell routers which prefixes the KV cache holds, over a separate port; --kv-events-config does so as well",
    )


def check_tokenizer(args: argparse.Namespace, flag: str, processor: str) -> None:
    """Refuse an engine's own tokenizer for requests that the frontend tokenizes: all but those for embeddings.

    :param flag: of Dynamo's own worker, such as ``--use-vllm-tokenizer``.
    :param processor: what the frontend calls the engine's own processing.
    :raises StartError: the flag is given, and the worker generates text.
    """
    if getattr(args, flag[2:].replace("-", "_")) and not args.embedding_worker:
        raise StartError(
            f"{flag} is not supported: the frontend tokenizes",
            hint=f"leave it out, or run the frontend with --dyn-chat-processor {processor}",
        )


def refuse_for_embeddings(args: argparse.Namespace, others: Mapping[str, object]) -> None:
    """Refuse flags of text generation on a worker that makes embeddings.

    :param others: names of flags in ``args``, with the values that ask for nothing, beside those that engines share.
        Those that this version of the engine lacks are ignored.
    :raises StartError: some are set; the message names them.
    """
    nothing = {"publish_kv_events": False, "enable_rl": False, **others}
    given = [name for name, value in nothing.items() if getattr(args, name, value) not in (value, None)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise StartError(
            f"--embedding-worker cannot be combined with {flags}: embeddings take one pass over each input, without "
            "KV caches to hand over and without an answer to generate",
            hint=f"leave {'it' if len(given) == 1 else 'them'} out",
        )


def drop_unread_events(args: argparse.Namespace, context: EngineContext) -> None:
    """Reset ``--publish-kv-events`` if no router would read the events: they reveal the tokens of prompts."""
    if args.publish_kv_events and not context.events_wanted:
        log.warning("KV events are not published: the router of --frontend does not read them", next="--router-mode kv")
        args.publish_kv_events = False


def kv_events_config(private_dir: Path) -> dict[str, str]:
    """Return the KV-events configuration of an engine on this machine: each rank publishes on a socket file.

    A port would be open to every user of this machine. Engines derive each rank's address from this one, but refuse to
    do so for a file (vLLM 0.31, SGLang 0.5.21) unless its name contains ``inproc``; then they append the rank.

    :param private_dir: directory of the sockets.
    """
    return {"publisher": "zmq", "endpoint": f"ipc://{private_dir}/kv-events-inproc", "topic": ""}


def keyword(values: Mapping[str, str], expected: str, unsupported: Mapping[str, str]) -> Callable[[str], str]:
    """Return the ``type`` of a flag that takes one of some words.

    :param values: what each word stands for; several may stand for the same.
    :param expected: the words to recommend.
    :param unsupported: words that Dynamo's own worker knows, and why they are not supported here.
    """

    def read(text: str) -> str:
        if text not in values:
            why = f"is not supported: {unsupported[text]}" if text in unsupported else "is unknown"
            raise argparse.ArgumentTypeError(f"{text} {why}; expected {expected}")
        return values[text]

    return read


def disaggregation_mode(aggregated: str = "aggregated") -> Callable[[str], str]:
    """Return the ``type`` of ``--disaggregation-mode``, with the words of Dynamo's own workers.

    :param aggregated: what stands for a worker of both phases.
    """
    both = dict.fromkeys(("agg", "pd", "prefill_and_decode", "aggregated", aggregated), aggregated)
    return keyword({**both, "prefill": "prefill", "decode": "decode"}, "agg, prefill or decode", _ENCODE)


def served_names(given: str | Iterable[str] | None) -> list[str]:
    """Return the names of a model, the main one first, from one or several words that may hold several each.

    :param given: the value of ``--served-model-name``; names are separated by commas or spaces.
    """
    words = [given] if isinstance(given, str) else given or ()
    return [name for word in words for name in re.split(r"[\s,]+", word) if name]


def switched_on(variable: str) -> bool:
    """Return whether an environment variable turns a switch on, as the default of its flag."""
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def add_switch(group: argparse._ArgumentGroup, flag: str, variable: str, text: str) -> None:
    """Add a flag with a ``--no-…`` form that an environment variable can turn on.

    :param text: the help, without the variable.
    """
    action = argparse.BooleanOptionalAction
    group.add_argument(flag, action=action, default=switched_on(variable), help=f"{text} ({variable})")


def non_negative(text: str) -> float:
    """Read a number of at least 0, as the ``type`` of a flag."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
