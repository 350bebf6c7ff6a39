"""What vLLM's schedulers tell the planner: the format, the numbers and the limits. vLLM itself is not started."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import RequestStatus

from dynamo_worker.testing.forward_passes import decode, is_idle
from dynamo_worker.testing.waiting import eventually
from dynamo_worker_vllm import forward_passes, load, processes
from dynamo_worker_vllm.forward_passes import Measurement, Publisher, QueueReader
from dynamo_worker_vllm.waiting import FORWARD_PASSES

#: Messages that Dynamo's own worker (1.6.1) encoded, and what it says is in them.
RECORDED = json.loads((Path(__file__).parents[3] / "tests" / "unit" / "data" / "forward_passes.json").read_text())


class Reader:
    """Reads what a rank publishes."""

    def __init__(self, path: Path) -> None:
        self.address = f"ipc://{path}/forward-passes.3"
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.set(zmq.RCVTIMEO, 10_000)
        self.socket.subscribe(b"")
        self.socket.connect(self.address)

    def read(self) -> tuple[bytes, dict[str, Any]]:
        topic, number, message = self.socket.recv_multipart()
        assert topic == b""
        decoded = decode(message)
        assert int.from_bytes(number, "big") == decoded["counter_id"]
        return message, decoded


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.socket.close(0)


@pytest.fixture
def publisher(reader: Reader) -> Iterator[Publisher]:
    publisher = Publisher(reader.address, "18282250309544046553", 3)
    reader.read()  # a heartbeat: now it is connected
    yield publisher
    publisher.close()


def test_the_format_is_that_of_dynamos_own_worker(reader: Reader, publisher: Publisher) -> None:
    busy, idle = RECORDED
    publisher._count = busy["message"]["counter_id"]
    message = busy["message"]
    publisher.publish(message["wall_time"], message["scheduled_requests"], message["queued_requests"])
    assert reader.read()[0].hex() == busy["encoded"]
    assert reader.read()[0].hex() == idle["encoded"]


def test_dynamos_own_reader_understands_it(reader: Reader, publisher: Publisher) -> None:
    """The planner's; it comes with the package `ai-dynamo`, which is not among the plugin's dependencies."""
    peer = pytest.importorskip("dynamo.common.forward_pass_metrics", reason="ai-dynamo is not installed")
    scheduler = Scheduler()
    Measurement(scheduler, publisher)
    scheduler.waiting = [request(50), request(70)]
    scheduler.run(new=[("a", 100, 60, 40)], cached=[("b", 80, 1), ("c", 90, 2)])
    metrics = peer.decode(reader.read()[0])
    assert (metrics.worker_id, metrics.dp_rank, metrics.version) == ("18282250309544046553", 3, peer.FPM_VERSION)
    assert metrics.scheduled_requests == peer.ScheduledRequestMetrics(1, 60, 0.0, 40, 2, 170, 25.0)
    assert metrics.queued_requests == peer.QueuedRequestMetrics(2, 120, 100.0)
    assert metrics.wall_time > 0


def test_heartbeats_while_nothing_runs(reader: Reader, publisher: Publisher) -> None:
    since = time.monotonic()
    messages = [reader.read()[1] for _ in range(2)]
    assert 1.5 < time.monotonic() - since < 4
    assert all(is_idle(message) for message in messages)
    assert messages[1]["counter_id"] == messages[0]["counter_id"] + 1


def test_iterations_are_sent_together(reader: Reader, publisher: Publisher) -> None:
    """In their order, soon after the first one."""
    since = time.monotonic()
    for number in range(1, 9):
        publisher.publish(float(number), forward_passes._NONE_RAN, forward_passes._NONE_WAIT)
    assert [reader.read()[1]["wall_time"] for _ in range(8)] == list(range(1, 9))
    assert forward_passes._COLLECT_SECONDS <= time.monotonic() - since < 1


def test_a_reader_that_does_not_read_delays_nothing(reader: Reader, publisher: Publisher) -> None:
    """What it misses is dropped, and its messages' numbers show that."""
    most = forward_passes._MOST_WAITING
    since = time.monotonic()
    for _ in range(4 * most):
        publisher.publish(0.1, forward_passes._NONE_RAN, forward_passes._NONE_WAIT)
        if len(publisher._passes) >= most - 1:
            eventually(lambda: not publisher._passes, 10, "what was collected to be sent")
    assert time.monotonic() - since < 20
    counters = []
    while not counters or counters[-1] < 4 * most:
        counters.append(reader.read()[1]["counter_id"])
    assert len(counters) < counters[-1] - counters[0]


def request(tokens: int, computed: int = 0, status: Any = RequestStatus.WAITING) -> Any:
    return SimpleNamespace(num_tokens=tokens, num_prompt_tokens=tokens, num_computed_tokens=computed, status=status)


class Scheduler:
    """What is asked of vLLM's schedulers."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.waiting: list[Any] = []
        self.kv_holding_waiting: list[Any] = []
        self.ended = False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return self.output

    def update_from_output(self, scheduler_output: Any, model_output: Any) -> Any:
        return {"of": model_output}

    def shutdown(self) -> None:
        self.ended = True

    def batch(self, new: Any = (), cached: Any = ()) -> Any:
        """Schedule requests.

        :param new: id, length of the prompt, tokens to compute, tokens found in the cache.
        :param cached: id, computed tokens, generated tokens; and of a prompt, its length and tokens to compute.
        """
        tokens: dict[str, int] = {}
        starting = []
        for name, length, count, computed in new:
            self.requests[name], tokens[name] = request(length), count
            data: Any = NewRequestData.__new__(NewRequestData)
            data.req_id, data.num_computed_tokens = name, computed
            starting.append(data)
        running = CachedRequestData.make_empty()
        for name, computed, generated, *prompt in cached:
            self.requests[name], tokens[name] = request(prompt[0] if prompt else 1), prompt[1] if prompt else 1
            running.req_ids.append(name)
            running.num_computed_tokens.append(computed)
            running.num_output_tokens.append(generated)
        output: Any = SchedulerOutput.make_empty()
        output.scheduled_new_reqs, output.scheduled_cached_reqs = starting, running
        output.num_scheduled_tokens, output.total_num_scheduled_tokens = tokens, sum(tokens.values())
        self.output = output
        return self.schedule(False)

    def run(self, new: Any = (), cached: Any = ()) -> Any:
        return self.update_from_output(self.batch(new, cached), "tokens")


class Messages:
    """Takes the place of a publisher."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.scheduled: list[Any] = []
        self.queued: list[Any] = []
        self.closed = False

    def publish(self, seconds: float, scheduled: Any, queued: Any) -> None:
        self.seconds.append(seconds)
        self.scheduled.append(tuple(scheduled.values()))
        self.queued.append(tuple(queued.values()))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def messages() -> Any:
    return Messages()


@pytest.fixture
def scheduler(messages: Any) -> Scheduler:
    scheduler = Scheduler()
    Measurement(scheduler, messages)
    return scheduler


def test_a_long_prompt_is_computed_in_parts(scheduler: Scheduler, messages: Messages) -> None:
    assert scheduler.run(new=[("a", 1000, 512, 128), ("b", 10, 10, 0)], cached=[("c", 50, 3)]) == {"of": "tokens"}
    scheduler.run(cached=[("a", 640, 0, 1000, 360), ("b", 10, 1), ("c", 51, 4)])
    scheduler.run(cached=[("a", 1000, 1), ("b", 11, 2), ("c", 52, 5)])
    mean = (1000 + 11 + 52) / 3
    variance = sum((each - mean) ** 2 for each in (1000, 11, 52)) / 3
    assert messages.scheduled[:2] == [(2, 522, 495.0**2, 128, 1, 50, 0.0), (1, 360, 0.0, 640, 2, 61, 20.5**2)]
    assert messages.scheduled[2] == (0, 0, 0.0, 0, 3, 1063, pytest.approx(variance))


def test_batches_overlap(scheduler: Scheduler, messages: Messages) -> None:
    """The next one is scheduled before the model has finished the one before."""
    first = scheduler.batch(new=[("a", 5, 5, 0)])
    second = scheduler.batch(cached=[("a", 5, 1)])
    time.sleep(0.1)
    scheduler.update_from_output(first, None)
    third = scheduler.batch(cached=[("a", 6, 2)])
    time.sleep(0.05)
    scheduler.update_from_output(second, None)
    scheduler.update_from_output(third, None)
    assert [each[:2] for each in messages.scheduled] == [(1, 5), (0, 0), (0, 0)]
    assert [each[5] for each in messages.scheduled] == [0, 5, 6]
    assert messages.seconds[0] >= 0.1 > messages.seconds[1] >= 0.05 > messages.seconds[2]


def test_a_pause_is_no_part_of_an_iteration(scheduler: Scheduler, messages: Messages) -> None:
    scheduler.run(new=[("a", 5, 5, 0)])
    scheduler.run()  # vLLM lets its workers forget finished requests
    assert len(messages.seconds) == 1
    time.sleep(0.2)
    scheduler.run(new=[("b", 5, 5, 0)])
    assert messages.seconds[1] < 0.1


def test_who_waits(scheduler: Scheduler, messages: Messages) -> None:
    scheduler.waiting = [request(100), request(300), request(500, 490, RequestStatus.PREEMPTED)]
    scheduler.kv_holding_waiting = [request(60, 50, RequestStatus.WAITING_FOR_REMOTE_KVS)]
    scheduler.run(new=[("a", 5, 5, 0)])
    assert messages.queued == [(2, 400, 10_000.0, 2, 540, 220.0**2)]


def test_a_long_queue_takes_little_time(scheduler: Scheduler) -> None:
    class Slow(list[Any]):
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            time.sleep(0.02)
            return super().__iter__()

    slow: Any = Slow([request(7)])
    scheduler.waiting = slow
    queue = QueueReader(scheduler)
    assert {queue.read()["sum_prefill_tokens"] for _ in range(1000)} == {7}
    assert slow.reads == 1, "a hundredth of the time is for reading"
    queue._next_at = 0.0
    slow.append(request(8))
    assert queue.read()["sum_prefill_tokens"] == 15


def test_a_scheduler_that_cannot_be_measured_serves(
    scheduler: Scheduler, messages: Messages, caplog: pytest.LogCaptureFixture
) -> None:
    output = scheduler.batch(new=[("a", 5, 5, 0)])
    assert scheduler.update_from_output(output, "tokens") == {"of": "tokens"}
    messages.queued = None  # type: ignore[assignment]
    assert scheduler.run(cached=[("a", 5, 1)]) == {"of": "tokens"}
    assert messages.closed
    assert "this scheduler cannot be measured" in caplog.text
    assert scheduler.run(cached=[("a", 6, 2)]) == {"of": "tokens"}
    assert len(messages.scheduled) == 2


def test_what_cannot_be_read_from_a_batch(scheduler: Scheduler, messages: Messages) -> None:
    scheduler.output = SimpleNamespace(total_num_scheduled_tokens=1)
    output = scheduler.schedule()
    assert messages.closed
    assert scheduler.update_from_output(output, "tokens") == {"of": "tokens"}


def test_the_end(scheduler: Scheduler, messages: Messages) -> None:
    scheduler.shutdown()
    assert messages.closed
    assert scheduler.ended


# ------------------------------------------------------------------------------------------ in place of vLLM's class


class Base:
    """Takes the place of vLLM's own scheduler."""

    def __init__(self, *, vllm_config: Any, **options: Any) -> None:
        self.options = options

    schedule = update_from_output = shutdown = waiting = None


class Own(Base):
    """A scheduler of a user."""


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a configuration of vLLM."""
    from vllm.v1.core.sched import scheduler

    monkeypatch.setattr(scheduler, "Scheduler", Base)
    monkeypatch.setenv(FORWARD_PASSES, "")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        parallel_config=SimpleNamespace(data_parallel_backend="mp", data_parallel_index=3),
    )
    kinds: dict[Any, Any] = {None: Base, "own": Own, "foreign": SimpleNamespace}
    config.scheduler_config.get_scheduler_cls = lambda: kinds[config.scheduler_config.scheduler_cls]
    return config


@pytest.mark.parametrize("name", [None, "own"])
def test_the_class_of_the_scheduler_stays(config: Any, name: str | None, tmp_path: Path, reader: Reader) -> None:
    config.scheduler_config.scheduler_cls = name
    load.measure_forward_passes(config, 5, tmp_path)
    assert config.scheduler_config.scheduler_cls == "dynamo_worker_vllm.forward_passes.measured_scheduler"
    made = forward_passes.measured_scheduler(vllm_config=config, block_size=16)
    assert config.scheduler_config.scheduler_cls == name
    assert type(made) is (Own if name else Base)
    assert made.options == {"block_size": 16}
    message = reader.read()[1]
    assert (message["worker_id"], message["dp_rank"]) == ("5", 3)
    made.schedule.__self__._publisher.close()


def test_a_foreign_scheduler_is_left_alone(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config.scheduler_config.scheduler_cls = "foreign"
    load.measure_forward_passes(config, 5, tmp_path)
    made = forward_passes.measured_scheduler(vllm_config=config)
    assert made == SimpleNamespace(vllm_config=config)
    assert "SimpleNamespace is no vLLM Scheduler" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_gone(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load.measure_forward_passes(config, 5, tmp_path / "gone")
    made = forward_passes.measured_scheduler(vllm_config=config)
    assert made.schedule is None, "it is not watched"
    assert "No such file or directory" in caplog.text


def test_ray_places_the_engine_anywhere(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config.parallel_config.data_parallel_backend = "ray"
    with caplog.at_level(logging.WARNING):
        load.measure_forward_passes(config, 5, tmp_path)
    assert config.scheduler_config.scheduler_cls is None
    assert os.environ[FORWARD_PASSES] == ""
    assert "ray starts the EngineCores" in caplog.text


def test_what_is_set_for_the_engine_does_not_restart_a_preloaded_process() -> None:
    """Its imports do not depend on it."""
    assert {FORWARD_PASSES, "DYN_FPM_TRACE"} <= processes._HARMLESS


def test_a_closed_publisher_leaves_no_thread(reader: Reader) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "forward-passes"]

    publisher = Publisher(reader.address, "1", 3)
    assert threads()
    publisher.close()
    eventually(lambda: not threads(), 5, "the heartbeats to end")
    publisher.publish(0.1, {}, {})  # a late iteration
    publisher.close()
