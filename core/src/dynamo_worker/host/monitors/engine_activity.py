"""Tells an engine that works from one that hangs, by what its processes do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dynamo_worker.supervisor import linux, process_tree
from dynamo_worker.supervisor.linux import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence

    from dynamo_worker.supervisor.linux import Stat

#: Share of one core that a process uses while it works. One that only waits in short sleeps uses 0.06 of a core
#: (vLLM's processes on a CPU, measured).
WORKING_SHARE: Final = 0.15
#: Share of the samples in which the first thread of a process runs, or waits for a core, while it works: on crowded
#: cores it may get less than ``WORKING_SHARE``. There, one that only waits in short sleeps was ready in 0.36 of them,
#: one that works in all (seven runnable threads for each core, measured). Fewer samples than these tell nothing.
READY_SHARE: Final = 0.8
_LEAST_SAMPLES: Final = 5
#: Times in an observation that the processes are looked at, unless that took more than one part in ``_COST`` of it.
_SAMPLES: Final = 10
_COST: Final = 20.0

#: States in which a process cannot run: stopped, traced, and blocked in the kernel.
_HELD: Final = {"T": "stopped", "t": "stopped by a debugger", "D": "blocked in the kernel"}

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


class Finding(NamedTuple):
    """What the processes of an engine did for some seconds.

    :param works: whether there was a sign of work.
    :param reason: the sign of work, or why there was none, as the end of a sentence.
    """

    works: bool
    reason: str


class Sample(NamedTuple):
    """The processes below the worker at one time, parents before children, and the worker itself.

    :param at: the time in seconds (monotonic).
    :param cost: seconds of CPU time that it took.
    """

    at: float
    processes: Mapping[Process, Stat]
    cost: float = 0.0


def judge(samples: Sequence[Sample], engine: Collection[int], worker: int) -> Finding:
    """Return whether an engine works.

    A process that the engine cannot serve without, and that could not run in all that time, holds up the rest, however
    busy it is. Otherwise a compiler is a sign of work, and so is CPU time, of the engine's processes and their helpers.
    That of a process with others of the engine below it is none: it coordinates them, and many wait in a busy loop.

    :param engine: pids of the processes that the engine cannot serve without; if there are none, it runs in the worker.
    :param worker: pid of the worker.
    """
    if len(samples) < 2:
        return Finding(False, "its processes could not be examined")
    first, last = samples[0], samples[-1]
    for process, stat in last.processes.items():
        seen = [one.processes.get(process) for one in samples]
        if process.pid in engine and all(one and one.state in _HELD and one.ticks == stat.ticks for one in seen):
            return Finding(False, f"process {process.pid} ({stat.name}) is {_HELD[stat.state]} (state {stat.state})")
    for sample in samples:
        for process, stat in sample.processes.items():
            if stat.name in process_tree.COMPILERS and stat.state not in "TtZX":
                return Finding(True, f"compiler {stat.name} runs (process {process.pid})")
    seconds = last.at - first.at
    working = _working(last, engine) if engine else {worker}
    used: dict[Process, float] = {}
    ready: list[Process] = []
    for process, stat in last.processes.items():
        if process.pid not in working:
            continue
        stats = [sample.processes[process] for sample in samples if process in sample.processes]
        used[process] = (stat.ticks - stats[0].ticks) / _TICKS_PER_SECOND
        if len(stats) >= _LEAST_SAMPLES and sum(one.state == "R" for one in stats) >= READY_SHARE * len(stats):
            ready.append(process)
    if not used:
        return Finding(False, "its processes are gone")
    busiest = max(used, key=lambda process: used[process])
    cpu = f"process {busiest.pid} ({last.processes[busiest].name}) used {used[busiest]:.1f} s of CPU time "
    cpu += f"in {seconds:.1f} s"
    if used[busiest] >= WORKING_SHARE * seconds:
        return Finding(True, cpu)
    for process in ready:
        name = last.processes[process].name
        return Finding(True, f"process {process.pid} ({name}) runs, or waits for a core, all the time")
    return Finding(False, f"no compiler runs, and the busiest {cpu}")


def _working(sample: Sample, engine: Collection[int]) -> set[int]:
    """Return the pids of an engine's processes and their helpers, without those that coordinate others."""
    belonging, coordinating = set(engine), set()
    parents = {process.pid: stat.parent for process, stat in sample.processes.items()}
    for pid, parent in parents.items():  # parents come before their children
        if parent in belonging:
            belonging.add(pid)
        above = parent
        while pid in engine and above in parents:
            coordinating.add(above)
            above = parents[above]
    return belonging - coordinating


class EngineActivity:
    """Observes the processes of an engine while it makes no progress.

    It reads nothing else of a process than ``/proc/PID/stat``: other files block while the process hangs in the kernel.
    It does so in a thread of its own.
    """

    def __init__(self, engine: Collection[int]) -> None:
        """Observe an engine.

        :param engine: pids of the processes that it cannot serve without; empty if it runs in this process.
        """
        self._engine = frozenset(engine)
        self._executor = ThreadPoolExecutor(1, "engine-activity")
        self._executor.submit(int)  # starts the thread while there is room for one

    def observe(self, seconds: float, progress: Callable[[], object], *, after: float = 0.0) -> Observation:
        """Start to observe, for some seconds that begin after others.

        :param progress: returns what changes when the engine makes progress.
        """
        own = None if self._engine else own_sample
        return Observation(self._sample, self._judge, progress, seconds / _SAMPLES, after, own)

    async def _sample(self) -> Sample:
        return await asyncio.get_running_loop().run_in_executor(self._executor, take_sample)

    def _judge(self, samples: Sequence[Sample]) -> Finding:
        return judge(samples, self._engine, os.getpid())


class Observation:
    """Takes samples until it is closed."""

    def __init__(
        self,
        sample: Callable[[], Coroutine[Any, Any, Sample]],
        judge_samples: Callable[[Sequence[Sample]], Finding],
        progress: Callable[[], object],
        pause: float,
        after: float,
        own: Callable[[], Sample] | None,
    ) -> None:
        self._sample = sample
        self._own = own
        self._judge = judge_samples
        self._progress = progress
        self._samples: list[Sample] = []
        self._before: object = None
        self._task = asyncio.ensure_future(self._run(pause, after))

    async def _run(self, pause: float, after: float) -> None:
        await asyncio.sleep(after)
        self._before = self._progress()
        if self._own is not None:
            self._samples.append(self._own())
        # No thread can be started, or no descriptor is left: then nothing is known.
        with contextlib.suppress(RuntimeError, MemoryError, OSError):
            while True:
                sample = await self._sample()
                self._samples.append(sample)
                await asyncio.sleep(max(pause, _COST * sample.cost))

    def finding(self) -> Finding:
        """Return whether the engine has worked, without any progress, while it was observed."""
        last = [self._own()] if self._samples and self._own is not None else []
        finding = self._judge([*self._samples, *last])
        if finding.works and self._progress() != self._before:
            return Finding(False, "it makes progress otherwise")
        return finding

    def close(self) -> None:
        """Stop; the finding remains."""
        self._task.cancel()


def take_sample() -> Sample:
    """Look at the processes below this one, and at this one."""
    # Not the time that passed: on crowded cores that is mostly waiting, and too few samples would tell nothing.
    started = time.thread_time()
    processes = {**process_tree.descendants(os.getpid()), **own_sample().processes}
    return Sample(time.monotonic(), processes, time.thread_time() - started)


def own_sample() -> Sample:
    """Look at this process only, without a thread: an engine that works in this process hardly lets another run."""
    own = linux.read_stat(os.getpid())
    return Sample(time.monotonic(), {} if own is None else {Process(os.getpid(), own.start): own})
