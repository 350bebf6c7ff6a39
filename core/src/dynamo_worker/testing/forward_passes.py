"""Forward-pass metrics as Dynamo's planner receives them, and a check that they tell what was served."""

from __future__ import annotations

import itertools
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker.testing.cluster import Cluster, Worker

_RECEIVE: Final = """
import asyncio, sys
from dynamo.llm import FpmEventSubscriber
from dynamo.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    subscriber = FpmEventSubscriber(runtime.endpoint(sys.argv[1]))

    def receive():
        while (message := subscriber.recv()) is not None:
            print(message.hex(), flush=True)

    await asyncio.to_thread(receive)

asyncio.run(main())
"""
#: MessagePack's types of fixed size, by their first byte.
_FIXED: Final = {0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD3: ">q"}


class Planner:
    """Receives the metrics of all workers of an endpoint, with the runtime's own subscriber.

    :ivar messages: those received so far.
    """

    def __init__(self, cluster: Cluster, endpoint: str = "dynamo.backend.generate") -> None:
        self.messages: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RECEIVE, endpoint],
            env=cluster.environment(DYN_LOG="error"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.messages.append(decode(bytes.fromhex(line.decode())))

    def ranks(self, since: int = 0) -> dict[int, list[dict[str, Any]]]:
        """Return the messages of each data-parallel rank.

        :param since: number of messages to leave out.
        """
        ranks: dict[int, list[dict[str, Any]]] = {}
        for message in self.messages[since:]:
            ranks.setdefault(message["dp_rank"], []).append(message)
        return ranks

    def close(self) -> None:
        """Stop receiving."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def check_all(cluster: Cluster, worker: Worker, process: str, ranks: Sequence[int] = (0,)) -> None:
    """Check a ready worker that publishes its metrics: while it serves, and after its engine was killed.

    :param process: pattern of the engine's process to kill.
    :param ranks: the worker's data-parallel ranks.
    """
    cluster.start_frontend()
    cluster.wait_model()
    planner = Planner(cluster)
    try:
        check(cluster, planner, ranks)
        worker.signal(signal.SIGKILL, worker.child(process))
        assert worker.wait_gone(15) == 1
        eventually(lambda: not [*cluster.discovery.rglob("event_channels/*")], 15, "no announcement to be left")
    finally:
        planner.close()


def check(cluster: Cluster, planner: Planner, ranks: Sequence[int] = (0,), requests: int = 8, tokens: int = 30) -> None:
    """Send requests to an idle worker, and check that its metrics agree with the answers.

    :param ranks: the worker's data-parallel ranks.
    """

    def idle(since: int = 0) -> bool:
        """Return whether every rank has sent two heartbeats one after the other."""
        found = planner.ranks(since)
        return all([is_idle(each) for each in found.get(rank, [])[-2:]] == [True, True] for rank in ranks)

    eventually(idle, 30, "two heartbeats of every rank")
    since = len(planner.messages)

    def ask(number: int) -> dict[str, Any]:
        status, answer = cluster.complete(f"{number} " * (10 + number), tokens, ignore_eos=True)
        assert status == 200, answer
        usage: dict[str, Any] = answer["usage"]
        return usage

    with ThreadPoolExecutor(requests) as pool:
        usages = list(pool.map(ask, range(requests)))
    eventually(lambda: idle(since), 10, "heartbeats after the last request")
    found = planner.ranks(since)
    assert sorted(found) == list(ranks)
    assert len({message["worker_id"] for message in planner.messages}) == 1
    for messages in found.values():
        counters = [message["counter_id"] for message in messages]
        assert counters == list(range(counters[0], counters[0] + len(counters))), "a message was lost"
        # The wall time of an iteration leaves out the pause before it.
        assert all(is_idle(message) or 0 < message["wall_time"] < 1 for message in messages), messages
    passes = [message["scheduled_requests"] for message in itertools.chain(*found.values())]
    prompts = [usage["prompt_tokens"] for usage in usages]
    assert sum(each["sum_prefill_tokens"] for each in passes) == sum(prompts)
    assert sum(each["num_prefill_requests"] for each in passes) >= requests  # more if they are computed in parts
    # A prefill makes the first token.
    assert sum(each["num_decode_requests"] for each in passes) == requests * (tokens - 1)
    decodes = [each for each in passes if each["num_decode_requests"]]
    contexts = [each["sum_decode_kv_tokens"] / each["num_decode_requests"] for each in decodes]
    assert min(prompts) <= min(contexts), "less context than the shortest prompt"
    assert max(contexts) <= max(prompts) + tokens, "more context than the longest answer"


def is_idle(message: dict[str, Any]) -> bool:
    """Return whether a message is a heartbeat."""
    numbers = (*message["scheduled_requests"].values(), *message["queued_requests"].values())
    return message["wall_time"] == 0 and not any(numbers)


def decode(data: bytes) -> Any:
    """Return what a message contains.

    :raises ValueError: it is not MessagePack, or of a kind that these messages do not use.
    """
    value, end = _decode(data, 0)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes too many")
    return value


def _decode(data: bytes, at: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind <= 0x7F:
        return kind, at
    if kind in _FIXED:
        size = struct.calcsize(_FIXED[kind])
        return struct.unpack_from(_FIXED[kind], data, at)[0], at + size
    if kind & 0xE0 == 0xA0 or kind == 0xD9:
        length, at = (data[at], at + 1) if kind == 0xD9 else (kind & 0x1F, at)
        return data[at : at + length].decode(), at + length
    if kind & 0xF0 == 0x80:
        entries = {}
        for _ in range(kind & 0x0F):
            name, at = _decode(data, at)
            entries[name], at = _decode(data, at)
        return entries, at
    raise ValueError(f"byte {kind:#x} is unexpected")
