"""Keeps what an engine class does to the whole process from replacing what the worker has set up.

Classes are written for a process of their own: they configure logging, install signal handlers and let ``argparse`` end
the interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

from dynamo.runtime import logging as dynamo_logging

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

log = get_logger(__name__)

#: What ends a process, and belongs to the supervisor.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class FlagsError(Exception):
    """A class's ``argparse`` parser has refused its flags."""


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Run code of an engine class, and undo what it does to logging, signals and the hook for uncaught errors."""
    loop = asyncio.get_running_loop()
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    main = threading.current_thread() is threading.main_thread()
    signals = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}

    def add_signal_handler(number: int, callback: Any, *arguments: Any) -> None:
        if number not in _SIGNALS:
            type(loop).add_signal_handler(loop, number, callback, *arguments)
            return
        name = signal.Signals(number).name
        log.info("The engine class wants to handle a signal, which never reaches it", signal=name)

    with (
        # Records go on to the worker's handlers meanwhile, and not to the runtime, which drops most of them.
        mock.patch.object(dynamo_logging, "configure_dynamo_logging"),
        mock.patch.object(loop, "add_signal_handler", add_signal_handler),
    ):
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            sys.excepthook = hook
            for number, handler in signals.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


@contextlib.contextmanager
def no_exit_of_argparse() -> Iterator[None]:
    """Make parsers raise :class:`FlagsError` instead of printing their usage and ending the interpreter."""

    def error(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise FlagsError(message)

    with mock.patch.object(argparse.ArgumentParser, "error", error):
        yield
