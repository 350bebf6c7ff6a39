"""How vLLM's processes wait for each other: those of a dynamo-worker sleep on a CPU, all others spin as vLLM does."""

from __future__ import annotations

import logging
import threading
import time
from importlib.metadata import entry_points

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.platforms import current_platform

from dynamo_worker_vllm import waiting

SPINNING = shm_broadcast.sched_yield


@pytest.fixture(autouse=True)
def _process_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast, "sched_yield", SPINNING)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    monkeypatch.setenv(waiting.MARK, "1")


def test_vllm_calls_it_in_each_of_its_processes() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="dynamo_worker")
    entry.load()()
    assert shm_broadcast.sched_yield is not SPINNING


def test_who_waits_for_a_message_leaves_the_core_to_others() -> None:
    waiting.install()
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    began = time.thread_time()
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.5)
    assert time.thread_time() - began < 0.15
    threading.Timer(0.1, writer.enqueue, ["a step"]).start()
    assert reader.dequeue(timeout=30.0) == "a step"


def test_other_processes_of_vllm_spin_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(waiting.MARK)
    waiting.install()
    assert shm_broadcast.sched_yield is SPINNING


def test_processes_of_a_gpu_spin_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    waiting.install()
    assert shm_broadcast.sched_yield is SPINNING


def test_a_vllm_that_waits_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(shm_broadcast, "sched_yield")
    with caplog.at_level(logging.WARNING):
        waiting.install()
    assert "this version of vLLM is not supported" in caplog.text
