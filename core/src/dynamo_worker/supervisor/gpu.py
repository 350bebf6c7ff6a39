"""Waits until the driver shows no GPU memory held by processes that were killed.

A killed process is gone from ``/proc`` before the driver has torn its context down; who starts the next worker in
that moment finds no free memory. NVML numbers processes as the host does. Inside a container with a pid namespace
of its own the killed pids cannot be found in its list; there, the wait is for the used memory to stop falling.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

#: Longest wait for the driver.
LIMIT = 5.0

_INTERVAL = 0.02

#: In a container: memory counts as settled when it has not fallen for this long.
_SETTLED = 0.2

#: The inode of the machine's first pid namespace (``PROC_PID_INIT_INO`` of the kernel).
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


class Driver(Protocol):
    """What the wait needs to know from the driver."""

    def processes(self) -> set[int]:
        """Return the pids that hold memory on any GPU."""

    def used_memory(self) -> int:
        """Return the bytes in use on all GPUs."""


class Nvml:
    """The NVIDIA driver, through ``libnvidia-ml.so.1``.

    :raises OSError: there is no such library or driver.
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
            raise OSError("NVML does not start")
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
    """Return whether there may be an NVIDIA GPU here, without loading anything."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def pids_are_the_hosts() -> bool:
    """Return whether our pids are the machine's, so that NVML's list can be searched for them."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def wait_released(driver: Driver, killed: Collection[int], deadline: float, *, same_pids: bool) -> str:
    """Wait until none of the killed processes holds GPU memory, and say in words how that ended.

    :param same_pids: whether NVML and we number processes alike.
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
