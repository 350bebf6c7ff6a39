"""An uncaught exception of the main thread shuts the engine down, whoever catches it afterwards or not."""

from __future__ import annotations

import sys
import weakref
from types import TracebackType


class ExceptionHandler:
    """Replaces `sys.excepthook`: reports the exception as before, then calls what was registered."""

    def __init__(self) -> None:
        self._previous = sys.excepthook
        self._registered: list[tuple[weakref.ref[object], str]] = []

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        self._previous(kind, error, traceback)
        for reference, method in self._registered:
            target = reference()
            if target is not None:
                getattr(target, method)()

    def register(self, target: object, method: str) -> None:
        """Call that method of the object, as long as the object exists."""
        self._registered.append((weakref.ref(target), method))


exception_handler = ExceptionHandler()
sys.excepthook = exception_handler
