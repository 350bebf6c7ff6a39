"""Starts Python without the current directory on its path, where there may be an unrelated ``uvloop.py``.

``python -m`` and ``python -c`` put it first. Python 3.11 and later have ``-P``, which ``multiprocessing`` passes on,
and ``PYTHONSAFEPATH`` for interpreters that other code starts; Python 3.10 has neither.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Removes the entry that ``python -c`` adds to the path of Python 3.10, before anything is imported from there.
_WITHOUT_CURRENT_DIRECTORY = "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]\n"

_RUN_MODULE = "from runpy import run_module; del sys.argv[0]; run_module(sys.argv[0], None, '__main__', True)"

#: Keeps the current directory off the path of every interpreter, unless it is empty.
SAFE_PATH = "PYTHONSAFEPATH"


def has_safe_path() -> bool:
    """Return whether this Python supports ``-P``."""
    return sys.version_info >= (3, 11)


def module_command(module: str) -> list[str]:
    """Return the command that runs one of our modules with this interpreter."""
    if has_safe_path():
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _WITHOUT_CURRENT_DIRECTORY + _RUN_MODULE, module]


def code_arguments(code: str) -> list[str]:
    """Return the arguments that make an interpreter run ``code``."""
    return ["-P", "-c", code] if has_safe_path() else ["-c", _WITHOUT_CURRENT_DIRECTORY + code]


def own_code(argument: bytes) -> bytes:
    """Return the ``-c`` code of an interpreter without the line that we prepended."""
    return argument.removeprefix(_WITHOUT_CURRENT_DIRECTORY.encode())


def protect_multiprocessing() -> None:
    """Make ``multiprocessing`` start its interpreters safely where there is no ``-P`` to pass on."""
    if has_safe_path():
        return
    from multiprocessing import util

    start = util.spawnv_passfds

    def start_safely(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
        changed = list(args)
        if "-c" in changed[:-1]:
            at = changed.index("-c") + 1
            changed[at] = _WITHOUT_CURRENT_DIRECTORY + changed[at]
        return start(path, changed, passfds)

    util.spawnv_passfds = start_safely


def leave_script_directory() -> None:
    """Remove the directory that the interpreter put first on its path, before anything is imported from there.

    That is the current directory for ``python -m``, and the script's directory for a script.
    """
    if getattr(sys.flags, "safe_path", False) or not sys.path:
        return
    expected = {"", os.path.dirname(os.path.abspath(sys.argv[0])), os.path.dirname(os.path.realpath(sys.argv[0]))}
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        expected.add(os.getcwd())
    if sys.path[0] in expected:
        del sys.path[0]
