"""Prometheus metrics of the engine's processes, which write them into files that this process reads.

``prometheus_client`` writes files where ``PROMETHEUS_MULTIPROC_DIR`` says when it is imported. The worker itself keeps
its metrics in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dynamo_worker.errors import StartError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor import process_tree
from dynamo_worker.supervisor.protocol import RUN_DIR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

log = get_logger(__name__)

#: The environment variable with the directory of the files.
VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_NAME: Final = "prometheus"
_FILE: Final = re.compile(r"[a-z]+(?:_[a-z]+)?_(\d+)\.db")
#: Most files that one scrape reads, and most bytes of each; a process has up to eight, of 1 MiB if it has few metrics.
_MOST_FILES, _MOST_BYTES = 512, 32 << 20


def expected() -> dict[str, str]:
    """Return the variable that :func:`share` will set in this worker, for :func:`dynamo_worker.kit.preload.prepare`.

    The directory is made now: modules that are preloaded may have metrics already.
    """
    run_dir = os.environ.get(RUN_DIR)
    if not run_dir:
        return {}
    directory = os.path.join(run_dir, _NAME)
    with contextlib.suppress(OSError):  # reported by `share`
        os.makedirs(directory, mode=0o700, exist_ok=True)
    return {VARIABLE: directory}


def share(private_dir: Path) -> str:
    """Let processes that start from now on write their metrics into files, and return the directory of the files.

    :param private_dir: where to make the directory, which is then removed with the worker. If the operator has set one
        it is used, and stays.
    :raises StartError: the directory cannot be made.
    """
    directory = os.environ.setdefault(VARIABLE, str(private_dir / _NAME))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StartError(
            f"the directory {directory} for metrics cannot be made: {error.strerror}",
            hint=f"unset {VARIABLE}, or choose another directory",
        ) from error
    return directory


class ChildCollector(Collector):
    """Collects the metrics of the processes below this one whose names begin with one of some prefixes.

    Files of other processes do not count: those of an earlier worker may be left in a directory of the operator's.
    """

    def __init__(self, directory: str, *prefixes: str) -> None:
        self._directory = directory
        self._prefixes = prefixes
        self._broken: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics, added up over the processes."""
        files = list(self._files({process.pid for process in process_tree.descendants(os.getpid())}))
        try:
            merged = _merged(files)
        except Exception:  # one file is broken, or has just gone with its process
            merged = _merged([path for path in files if self._readable(path)])
        return (metric for metric in merged if metric.name.startswith(self._prefixes))

    def _files(self, pids: set[int]) -> Iterable[str]:
        try:
            names = os.listdir(self._directory)
        except OSError:
            return []
        owners = ((name, _FILE.fullmatch(name)) for name in sorted(names))
        ours = [name for name, match in owners if match is not None and int(match[1]) in pids]
        return [os.path.join(self._directory, name) for name in ours[:_MOST_FILES]]

    def _readable(self, path: str) -> bool:
        try:
            _merged([path])
        except FileNotFoundError:
            return False
        except Exception as error:
            if path not in self._broken:
                self._broken.add(path)
                log.warning("Metrics of a process cannot be read", file=path, error=error)
            return False
        return True


def _merged(files: list[str]) -> list[Metric]:
    """Return the metrics in some files.

    :raises Exception: a file cannot be read, or has no valid content.
    """
    for path in files:
        if os.path.getsize(path) > _MOST_BYTES:
            raise ValueError(f"{path} has more than {_MOST_BYTES} bytes")
    merged: Any = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return list(merged)
