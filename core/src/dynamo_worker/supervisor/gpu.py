"""Waits until the driver has released the GPU memory of processes that were killed.

A killed process leaves ``/proc`` before the driver has torn down its context; a worker started in that moment finds no
free memory. NVML reports the pids of the host. In a container with its own pid namespace the killed pids are not in
NVML's list, so the wait there is for the used memory to stop falling.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

#: Seconds to wait for the driver.
LIMIT = 5.0

_INTERVAL = 0.02

#: Seconds without a decrease after which memory in a container counts as settled.
_SETTLED = 0.2

#: Inode of the machine's initial pid namespace (``PROC_PID_INIT_INO`` in the kernel).
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


class Driver(Protocol):
    """What the wait needs to know from the driver."""

    def processes(self) -> set[int]:
        """Return the pids that hold memory on any GPU."""

    def used_memory(self) -> int:
        """Return the bytes in use on all GPUs."""


class Nvml:
    """The NVIDIA driver, through ``libnvidia-ml.so.1``.

    :raises OSError: the library or the driver is missing.
    """

    class _Process(ctypes.Structure):
        _fields_ = [
            ("pid", ctypes.c_uint),
            ("used", ctypes.c_ulonglong),
            ("gpu_instance", ctypes.c_uint),
            ("compute_instance", ctypes.c_uint),
        ]

    class _Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        if self._library.nvmlInit_v2() != 0:
            raise OSError("NVML failed to initialize")
        count = ctypes.c_uint()
        self._library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        self._devices = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            if self._library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
                self._devices.append(device)

    def processes(self) -> set[int]:
        """Return the pids that hold memory on any GPU."""
        pids: set[int] = set()
        for device in self._devices:
            count = ctypes.c_uint(1024)
            list_ = (self._Process * count.value)()
            if self._library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), list_) == 0:
                pids |= {list_[index].pid for index in range(count.value)}
        return pids

    def used_memory(self) -> int:
        """Return the bytes in use on all GPUs."""
        total = 0
        for device in self._devices:
            memory = self._Memory()
            if self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0:
                total += memory.used
        return total


def present() -> bool:
    """Return whether there may be an NVIDIA GPU, without loading a library."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def pids_are_the_hosts() -> bool:
    """Return whether our pids are the host's, so NVML's list can be searched for them."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def wait_released(driver: Driver, killed: Collection[int], deadline: float, *, same_pids: bool) -> str:
    """Wait until none of the killed processes holds GPU memory, and describe how that ended.

    :param same_pids: whether NVML reports the same pids as we see.
    :param deadline: when to give up (monotonic).
    """
    started = time.monotonic()
    if not same_pids and not driver.processes() & set(killed):
        return _wait_settled(driver, started, deadline)
    while True:
        holding = driver.processes() & set(killed)
        now = time.monotonic()
        if not holding:
            return f"released in {now - started:.2f} s"
        if now >= deadline:
            return f"still held by {', '.join(map(str, sorted(holding)))} after {now - started:.2f} s"
        time.sleep(_INTERVAL)


def _wait_settled(driver: Driver, started: float, deadline: float) -> str:
    lowest = driver.used_memory()
    since = time.monotonic()
    while True:
        now = time.monotonic()
        if now - since >= _SETTLED:
            return f"memory settled in {since - started:.2f} s (container: the driver's pids are the host's)"
        if now >= deadline:
            return f"memory still falling after {now - started:.2f} s"
        time.sleep(_INTERVAL)
        used = driver.used_memory()
        if used < lowest:
            lowest, since = used, time.monotonic()
