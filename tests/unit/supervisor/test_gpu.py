"""Against a stand-in for the driver; the real one is tested where there is a GPU."""

from __future__ import annotations

import os
import time

import pytest

from dynamo_worker.supervisor import gpu


class FakeDriver:
    """Shows the given processes and memory, one step further at each look."""

    def __init__(self, *, processes=((),), memory=(0,)):
        self._processes = list(processes)
        self._memory = list(memory)

    def processes(self):
        return set(self._processes.pop(0) if len(self._processes) > 1 else self._processes[0])

    def used_memory(self):
        return self._memory.pop(0) if len(self._memory) > 1 else self._memory[0]


def test_waits_until_no_killed_process_is_listed():
    driver = FakeDriver(processes=[(1, 2, 99), (1, 99), (99,)])
    outcome = gpu.wait_released(driver, {1, 2}, time.monotonic() + 5, same_pids=True)
    assert outcome.startswith("released in")


def test_gives_up_at_the_deadline_and_names_them():
    outcome = gpu.wait_released(FakeDriver(processes=[(7, 8)]), {7, 8}, time.monotonic() + 0.05, same_pids=True)
    assert outcome.startswith("still held by 7, 8")


def test_in_a_container_waits_for_memory_to_settle():
    driver = FakeDriver(processes=[(50001,)], memory=[100, 90, 80, 10, 10])
    outcome = gpu.wait_released(driver, {7}, time.monotonic() + 5, same_pids=False)
    assert "settled" in outcome


def test_in_a_container_with_memory_that_never_settles():
    class Falling(FakeDriver):
        def used_memory(self):
            return -int(time.monotonic() * 1000)

    outcome = gpu.wait_released(Falling(), {7}, time.monotonic() + 0.5, same_pids=False)
    assert "still falling" in outcome


def test_in_a_container_whose_pids_the_driver_knows_all_the_same():
    outcome = gpu.wait_released(FakeDriver(processes=[(7,), (7,), ()]), {7}, time.monotonic() + 5, same_pids=False)
    assert outcome.startswith("released")


def test_without_a_driver():
    if gpu.present():
        pytest.skip("there is one")
    with pytest.raises(OSError, match=r"libnvidia-ml\.so\.1"):
        gpu.Nvml()


def test_pid_namespace():
    assert gpu.pids_are_the_hosts() == (os.stat("/proc/self/ns/pid").st_ino == 4026531836)


@pytest.mark.gpu
def test_the_real_driver():
    driver = gpu.Nvml()
    assert driver.used_memory() > 0
    assert os.getpid() not in driver.processes()
    assert gpu.wait_released(driver, {os.getpid()}, time.monotonic() + 5, same_pids=True).startswith("released")
