"""The command line: our few flags, then the engine class, and everything after it is the class's own."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from dynamo_worker.kit.engine_arguments import EarlyParser, disaggregation_mode
from dynamo_worker_dynamo.requests import REFUSABLE

if TYPE_CHECKING:
    from collections.abc import Sequence


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group(
        "dynamo engine",
        "Runs an engine class of Dynamo's LLMEngine protocol, unchanged; pip install 'dynamo-worker-dynamo[cuda]' has "
        "that protocol (dynamo.common.backend).",
    )
    group.add_argument(
        "--engine-processes",
        type=_pattern,
        metavar="REGEX",
        help="the class's processes that it cannot serve without, by their command lines; by default all that it has "
        "started and that still run when its start returns",
    )
    group.add_argument(
        "--refuse-fields",
        type=_fields,
        default=(),
        metavar="NAMES",
        help="fields of requests that the class ignores, separated by commas, such as n,guided_decoding: requests with "
        "them get HTTP 400 instead of an answer to another question",
    )
    group.add_argument(
        "--engine-class",
        action=_EngineClass,
        nargs=argparse.REMAINDER,
        metavar="MODULE:CLASS",
        help="MODULE:CLASS, and after it the class's own flags: --engine-class my_engine:MyEngine --model M",
    )
    parser.set_defaults(class_arguments=(), disaggregation_mode="aggregated")


class _EngineClass(argparse.Action):
    """Takes the class and its flags; of these, the worker itself needs the phase of requests."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        path, *words = list(values or ("",))
        if not re.fullmatch(r"[\w.]+:[\w.]+", path):
            parser.error(f"argument {option_string}: expected MODULE:CLASS and the class's own flags, got {path!r}")
        namespace.engine_class, namespace.class_arguments = path, tuple(words)
        early = EarlyParser()
        early.add_argument("--disaggregation-mode", type=disaggregation_mode())
        known = early.read(words)
        if known is not None and known.disaggregation_mode is not None:
            namespace.disaggregation_mode = known.disaggregation_mode


def _fields(text: str) -> tuple[str, ...]:
    names = tuple(name for name in (word.strip() for word in text.split(",")) if name)
    for name in names:
        if name not in REFUSABLE:
            raise argparse.ArgumentTypeError(f"{name!r} cannot be refused; expected some of {', '.join(REFUSABLE)}")
    return names


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
