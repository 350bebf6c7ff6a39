"""The few settings that the supervisor needs before, or without, the worker reading its own."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bytes of a configuration file that are read.
_MOST_BYTES = 256 * 1024


class EarlySettings:
    """Reads settings from the same places as the worker, in the same order: command line, environment, file.

    This is not a YAML parser: only lines such as ``log_format: json`` at the left margin are understood. For any
    other file, the worker announces these settings a little later.

    :param argv: the command line of ``dynamo-worker``, without its name.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv[: argv.index("--")] if "--" in argv else argv  # what follows belongs to the engine
        self._file = ""
        # An engine may have a `--config` of its own; its file has none of these settings.
        self._file = _beginning_of(self.get("worker_config", "") or self.get("config", ""))

    def get(self, name: str, default: str, *, variable: str = "") -> str:
        """Return a setting as it was written.

        :param variable: the environment variable, if it does not follow the usual pattern.
        """
        flag = "--" + name.replace("_", "-")
        line = re.search(rf"^{name}[ \t]*:[ \t]+(['\"]?)(.+?)\1[ \t]*(?:[ \t]#.*)?$", self._file, re.MULTILINE)
        value = os.environ.get(variable or f"DYN_WORKER_{name.upper()}") or (line[2] if line else default)
        for index, argument in enumerate(self._argv):
            if argument == flag and index + 1 < len(self._argv):
                value = self._argv[index + 1]
            elif argument.startswith(flag + "="):
                value = argument[len(flag) + 1 :]
        return value


def _beginning_of(path: str) -> str:
    """Return the text of a regular file; nothing for a FIFO, which can be read only once."""
    if not path:
        return ""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (OSError, ValueError):
        return ""
    try:
        return os.read(descriptor, _MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
