"""Rolling restarts: two workers under steady load, one restarted after the other, every request accounted for."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from common.load import Load, LoadSpecification
from common.report import median, progress, seconds, table
from common.subjects import OURS
from common.workbench import Workbench, WorkbenchError, files_below

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RATE = 100.0
MAX_TOKENS = 100
#: Bounds of a stop, and of a restart beside the worker's start.
_STOP_SECONDS = 30.0


@dataclass
class Rolling:
    """What came of a series of rolling restarts; times in seconds after the start of the load.

    :param title: what was restarted.
    :param ours: whether the bar of no lost request holds.
    :param restarts: when each restart began and ended (the new worker was registered).
    :param requests: the time at which each request ended, and whether it was completed.
    :param losses: reasons of the lost ones.
    :param codes: exit codes of the workers, by number of times.
    :param files_left: files that the stopped workers left behind, all together.
    """

    title: str
    ours: bool
    restarts: list[tuple[float, float]] = field(default_factory=list)
    requests: list[tuple[float, bool]] = field(default_factory=list)
    losses: dict[str, int] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    files_left: int = 0

    @property
    def lost(self) -> int:
        """Number of lost requests."""
        return sum(not completed for _, completed in self.requests)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    bench: Workbench,
    kind: str,
    title: str,
    mode: str | None,
    restarts: int,
    grace: float,
    streams: int,
    tokens: int = MAX_TOKENS,
    request_seconds: float = MAX_TOKENS / RATE,
) -> Rolling:
    """Restart two workers in turn.

    :param kind: `peer` or `ours`.
    :param title: what tables and plot call it.
    :param mode: drain mode of dynamo-worker.
    :param restarts: how many restarts.
    :param grace: grace period in seconds (`handoff` has none).
    :param streams: number of concurrent streams, each sending one request after the other.
    :param tokens: of each request.
    :param request_seconds: how long a request takes, roughly.
    """
    rolling = Rolling(title, kind == OURS)
    model = "rolling"
    flags = [] if mode is None else ["--drain", mode]
    additions = {}
    if mode in (None, "complete"):
        additions["DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"] = f"{grace:g}"
    workers = [bench.start(kind, model, flags, additions) for _ in range(2)]
    time.sleep(0.3)
    load = Load(
        LoadSpecification(
            bench.ports,
            model,
            streams,
            None,
            tokens,
            expected=bench.subject.expected(kind, tokens),
            count_by_usage=bench.subject.expected(kind, tokens) is None,
            # Spread over the length of a request, so that requests end all the time and not all at once.
            ramp=streams / request_seconds,
            timeout=60.0,
            time_limit=restarts * (_STOP_SECONDS + bench.subject.start_seconds) + 60.0,
        )
    )
    try:
        load.wait_streaming(30.0)
        start = time.monotonic()
        for number in range(restarts):
            worker = workers.pop(0)
            began = worker.program.signal(signal.SIGTERM)
            code = worker.program.wait(_STOP_SECONDS)
            rolling.codes[str(code)] = rolling.codes.get(str(code), 0) + 1
            rolling.files_left += len(files_below(worker.temporary))
            bench.end([worker])
            workers.append(bench.start(kind, model, flags, additions))
            rolling.restarts.append((began - start, time.monotonic() - start))
            if (number + 1) % 10 == 0 or number + 1 == restarts or bench.subject.spare_first:
                progress(f"{title}: {number + 1} of {restarts} restarts")
            # The frontend has seen the new worker in the discovery directory; it still has to connect to it.
            time.sleep(0.2)
        load.stop()
        result = load.result(60.0)
        rolling.requests = [(record.ended - start, record.lost is None) for record in result.records]
        rolling.losses = result.losses()
        return rolling
    finally:
        load.close()
        bench.end(workers)


def print_table(series: Sequence[Rolling]) -> None:
    """Print what came of them."""
    table(
        "Rolling restarts of 2 workers under steady load",
        ["", "restarts", "time per restart", "requests", "lost", "exit codes", "files left", "bar"],
        [
            [
                result.title,
                str(len(result.restarts)),
                seconds(median(end - start for start, end in result.restarts)),
                str(len(result.requests)),
                str(result.lost),
                ", ".join(f"{code}: {times}" for code, times in sorted(result.codes.items())),
                str(result.files_left),
                "ok" if result.lost == 0 else "MISSED" if result.ours else "",
            ]
            for result in series
        ],
    )


def plot(series: Sequence[Rolling], path: Path) -> bool:
    """Draw requests over time, with the restarts marked; return False where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    figure, axes = plt.subplots(len(series), 1, figsize=(11, 2.6 * len(series) + 0.6), squeeze=False)
    for axis, rolling in zip(axes[:, 0], series, strict=True):
        end = max((at for at, _ in rolling.requests), default=1.0)
        width = max(0.5, end / 200)
        bins = int(end / width) + 1
        completed, lost = [0.0] * bins, [0.0] * bins
        for at, whole in rolling.requests:
            if at >= 0:
                (completed if whole else lost)[int(at / width)] += 1 / width
        middles = [(number + 0.5) * width for number in range(bins)]
        for number, (began, ended) in enumerate(rolling.restarts):
            label = "restart: SIGTERM to the new worker's registration" if number == 0 else None
            axis.axvspan(began, ended, color="#dddddd", alpha=0.7, linewidth=0, label=label)
            axis.axvline(began, color="#999999", linewidth=0.6)
        axis.plot(middles, completed, color="#1f77b4", linewidth=1.2, label="completed per second")
        axis.bar(middles, lost, width=width, color="#d62728", label="lost per second")
        total = len(rolling.requests)
        axis.set_title(
            f"{rolling.title}: {len(rolling.restarts)} restarts, {total} requests, {rolling.lost} lost", fontsize=10
        )
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, end)
        axis.set_ylabel("requests / s")
    axes[-1, 0].set_xlabel("seconds")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncol=3)
    figure.tight_layout(rect=(0, 0.3 / (2.6 * len(series) + 0.6), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def load_series(values: Sequence[dict[str, Any]]) -> list[Rolling]:
    """Read what `Rolling.as_json` wrote.

    :raises WorkbenchError: it is something else.
    """
    try:
        return [Rolling(**value) for value in values]
    except TypeError as error:
        raise WorkbenchError(f"no rolling restarts in this file: {error}") from error
