"""What tells work from a hang: the rule on written samples, and the samples on real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dynamo_worker.host.monitors import engine_activity
from dynamo_worker.host.monitors.engine_activity import EngineActivity, Sample, judge
from dynamo_worker.supervisor import process_tree
from dynamo_worker.supervisor.linux import Process, Stat

WORKER, CORE, RANK, OTHER_RANK, HELPER, FRONTEND = 10, 20, 30, 31, 40, 50
#: Clock ticks of a fully used core between two samples.
FULL = os.sysconf("SC_CLK_TCK")


def stat(parent, *, name="python", state="S", ticks=0):
    return Stat(name=name, state=state, parent=parent, group=1, threads=1, start=1, ticks=ticks)


def sample(at, processes):
    return Sample(at, {Process(pid, 1): found for pid, found in processes.items()})


def seen(*moments):
    """Return samples, one a second, each given by what differs from a quiet tree of a core with two ranks."""
    quiet = {
        CORE: {"parent": WORKER},
        FRONTEND: {"parent": WORKER},
        RANK: {"parent": CORE},
        OTHER_RANK: {"parent": CORE},
        WORKER: {"parent": 1},
    }
    return [
        sample(second, {pid: stat(**(quiet.get(pid, {}) | moment.get(pid, {}))) for pid in [*quiet, *moment]})
        for second, moment in enumerate(moments)
    ]


def used(pid, share, **more):
    """Return three samples in which a process uses a share of a core."""
    return seen(*({pid: {"ticks": int(share * FULL * second), **more}} for second in range(3)))


def finding(samples, engine=(CORE, RANK, OTHER_RANK)):
    return judge(samples, engine, WORKER)


def test_an_engine_at_rest_does_not_work():
    found = finding(seen({}, {}, {}))
    assert not found.works
    assert "no compiler runs" in found.reason


@pytest.mark.parametrize(("share", "works"), [(1.0, True), (8.0, True), (0.2, True), (0.1, False), (0.06, False)])
def test_cpu_time_of_a_rank_is_work_unless_it_only_naps(share, works):
    found = finding(used(RANK, share))
    assert found.works is works
    assert f"process {RANK} (python) used {2 * share:.1f} s of CPU time in 2.0 s" in found.reason


@pytest.mark.parametrize(("states", "works"), [("RRRRRRRRRR", True), ("RRDRRRSRRR", True), ("RRSRRSSRRR", False)])
def test_a_rank_that_is_ready_all_the_time_works_however_little_it_gets_of_crowded_cores(states, works):
    found = finding(seen(*({RANK: {"state": state}} for state in states)))
    assert found.works is works
    assert not works or found.reason == f"process {RANK} (python) runs, or waits for a core, all the time"


def test_a_few_samples_do_not_show_that_a_rank_is_ready_all_the_time():
    assert not finding(seen(*[{RANK: {"state": "R"}}] * 4)).works
    assert finding(seen(*[{RANK: {"state": "R"}}] * 5)).works


def test_a_core_that_is_ready_all_the_time_waits_for_its_ranks():
    assert not finding(seen(*[{CORE: {"state": "R"}}] * 10)).works


def test_a_core_waits_for_its_ranks_and_may_spin_meanwhile():
    assert not finding(used(CORE, 1.0)).works
    assert finding(used(CORE, 1.0), engine=(CORE,)).works, "without ranks of its own it does the work itself"


def test_a_launcher_above_the_engine_is_not_work():
    """``mpirun``, for one, which the worker can serve without."""
    assert not finding(used(CORE, 1.0), engine=(RANK, OTHER_RANK)).works


@pytest.mark.parametrize("parent", [RANK, CORE])
def test_helpers_below_the_engine_work_for_it(parent):
    """Inductor compiles in Python processes."""
    assert finding(used(HELPER, 1.0, parent=parent)).works


@pytest.mark.parametrize("pid", [WORKER, FRONTEND])
def test_others_do_not_work_for_the_engine(pid):
    assert not finding(used(pid, 1.0)).works


def test_an_engine_without_processes_works_in_the_worker():
    assert finding(used(WORKER, 1.0), engine=()).works
    assert not finding(used(FRONTEND, 1.0), engine=()).works
    assert not finding(seen({}, {}), engine=()).works


@pytest.mark.parametrize("name", ["nvcc", "ptxas", "cicc", "ninja", "cc1plus"])
@pytest.mark.parametrize("parent", [RANK, CORE, WORKER])
def test_a_compiler_anywhere_is_work(name, parent):
    """It may wait for a disk, or for compilers below it."""
    found = finding(seen(*[{HELPER: {"parent": parent, "name": name}}] * 3))
    assert found == (True, f"compiler {name} runs (process {HELPER})")


def test_a_short_compiler_is_work():
    assert finding(seen({}, {HELPER: {"parent": RANK, "name": "ptxas", "state": "R"}}, {})).works


@pytest.mark.parametrize("state", ["T", "t", "Z"])
def test_a_compiler_that_does_not_run_is_none(state):
    assert not finding(seen(*[{HELPER: {"parent": RANK, "name": "ptxas", "state": state}}] * 3)).works


def test_the_kernel_shows_at_most_15_characters_of_a_name():
    assert not [name for name in process_tree.COMPILERS if len(name) > 15]


@pytest.mark.parametrize(
    ("state", "words"), [("T", "stopped"), ("t", "stopped by a debugger"), ("D", "blocked in the kernel")]
)
@pytest.mark.parametrize("pid", [CORE, RANK])
def test_a_process_that_cannot_run_holds_up_the_others_however_busy_they_are(state, words, pid):
    busy = {HELPER: {"parent": OTHER_RANK, "name": "nvcc"}}
    samples = seen(*({pid: {"state": state}, OTHER_RANK: {"ticks": FULL * second}, **busy} for second in range(3)))
    assert finding(samples) == (False, f"process {pid} (python) is {words} (state {state})")


def test_a_process_that_was_only_stopped_for_a_while_holds_up_nobody():
    samples = seen({RANK: {"state": "T"}}, {RANK: {"ticks": FULL}}, {RANK: {"ticks": 2 * FULL}})
    assert finding(samples).works
    samples = seen({}, {RANK: {"state": "T"}}, {RANK: {"state": "T"}})
    assert "stopped" not in finding(samples).reason, "the next observation will see it"


def test_a_process_that_waits_for_a_disk_again_and_again_is_not_blocked():
    samples = seen(*({RANK: {"state": "D", "ticks": FULL * second}} for second in range(3)))
    assert finding(samples).works


def test_helpers_that_cannot_run_hold_up_nobody():
    samples = seen(*({HELPER: {"parent": RANK, "state": "T"}, RANK: {"ticks": FULL * second}} for second in range(3)))
    assert finding(samples).works


def test_a_process_that_began_meanwhile_works_from_then_on():
    samples = seen({}, {HELPER: {"parent": RANK, "ticks": 0}}, {HELPER: {"parent": RANK, "ticks": FULL}})
    assert finding(samples).works


def test_another_process_with_the_same_pid_is_another_process():
    samples = [
        Sample(0, {Process(RANK, 1): stat(CORE)}),
        Sample(1, {Process(RANK, 2): stat(CORE, ticks=5 * FULL)}),
    ]
    assert not finding(samples).works


@pytest.mark.parametrize("samples", [[], seen({})])
def test_without_two_samples_nothing_is_known(samples):
    assert finding(samples) == (False, "its processes could not be examined")


# ------------------------------------------------------------------------------------------------- real processes

SECONDS = 0.5


@contextlib.contextmanager
def running(*command):
    """Run a process that has begun its work: it prints a line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def python(code):
    return running(sys.executable, "-c", f"print(flush=True)\n{code}")


def observed(*engine, seconds=SECONDS, after=0.0, progress=lambda: 0):
    async def main():
        observation = EngineActivity(engine).observe(seconds, progress, after=after)
        await asyncio.sleep(seconds + after)
        observation.close()
        return observation.finding()

    return asyncio.run(main())


def test_a_busy_loop():
    with python("while True: pass") as pid:
        found = observed(pid)
    assert found.works
    assert f"process {pid} (" in found.reason


def test_a_dead_lock():
    with python("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()") as pid:
        found = observed(pid)
    assert not found.works
    assert "no compiler runs" in found.reason


def test_a_loop_of_naps():
    with python("import time\nwhile True: time.sleep(50e-6)") as pid:
        assert not observed(pid, seconds=2 * SECONDS).works


def test_a_stopped_process_beside_a_busy_one():
    with python("while True: pass") as busy, python("while True: pass") as stopped:
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.1)
        found = observed(busy, stopped)
    assert found == (False, found.reason)
    assert f"process {stopped} (" in found.reason
    assert found.reason.endswith("is stopped (state T)")


def test_a_compiler(tmp_path):
    shutil.copy(shutil.which("sleep"), tmp_path / "cc1plus")
    code = f"import subprocess; subprocess.run([{str(tmp_path / 'cc1plus')!r}, '3'])"
    with python(code) as pid:
        time.sleep(0.2)
        found = observed(pid)
    assert found.works
    assert "compiler cc1plus runs" in found.reason


def test_an_engine_in_this_process():
    with ThreadPoolExecutor(1) as executor:
        found = executor.submit(observed, seconds=2 * SECONDS)
        while not found.done():
            sum(range(10_000))
            time.sleep(0)  # the observer's thread is in this process, too
    assert found.result().works
    assert not observed(seconds=2 * SECONDS).works, "the observation itself is no work"


def test_an_engine_in_this_process_that_lets_no_thread_run(monkeypatch):
    monkeypatch.setattr("dynamo_worker.host.monitors.engine_activity.take_sample", lambda: time.sleep(3 * SECONDS))

    async def main():
        observation = EngineActivity([]).observe(SECONDS, lambda: 0)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            sum(range(10_000))
            await asyncio.sleep(0)
        observation.close()
        return observation.finding()

    assert asyncio.run(main()).works


def test_an_engine_that_makes_progress_is_not_held_up_by_work():
    steps = iter(range(10))
    with python("while True: pass") as pid:
        assert observed(pid, progress=lambda: next(steps)) == (False, "it makes progress otherwise")


def test_it_begins_when_it_is_told(monkeypatch):
    times = []
    monkeypatch.setattr(engine_activity, "take_sample", lambda: times.append(time.monotonic()) or seen({})[0])
    started = time.monotonic()
    observed(RANK, after=0.3)
    assert times[0] - started >= 0.29
    assert 2 <= len(times) <= 11


def test_it_takes_a_small_part_of_the_time(monkeypatch):
    """On a machine with many processes."""
    times = []
    monkeypatch.setattr(
        engine_activity, "take_sample", lambda: times.append(time.monotonic()) or seen({})[0]._replace(cost=0.01)
    )
    observed(RANK)
    assert len(times) <= 3


def test_waiting_for_a_core_takes_no_part_of_it(monkeypatch):
    """Otherwise an engine on crowded cores is looked at once, which tells nothing of it."""

    def wait(_: int):
        time.sleep(0.05)
        return {}

    monkeypatch.setattr(process_tree, "descendants", wait)
    assert engine_activity.take_sample().cost < 0.02


def test_a_file_system_that_hangs_stops_nothing(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(engine_activity, "take_sample", over.wait)
    started = time.monotonic()

    async def main():
        observation = EngineActivity([RANK]).observe(0.1, lambda: 0)
        await asyncio.sleep(0.1)
        observation.close()
        assert observation.finding() == (False, "its processes could not be examined")
        assert time.monotonic() - started < 1
        over.set()

    asyncio.run(main())


def test_without_descriptors_nothing_is_known(monkeypatch, caplog):
    def fail():
        raise OSError("too many open files")

    monkeypatch.setattr(engine_activity, "take_sample", fail)
    assert observed(RANK) == (False, "its processes could not be examined")
    assert not caplog.records
