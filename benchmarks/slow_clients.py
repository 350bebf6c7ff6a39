#!/usr/bin/env python3
"""Slow clients: how clients that do not read affect the other clients of the same worker.

A worker serves 32 streams at full speed, with and without slow clients. Slow clients request long answers with 20 log
probabilities per token, and do not read them or read 10 kB/s. The load starts once the worker has detected all of them
as slow and is idle, because until then their answers cost as much as any other. Ratios are computed within a round.

The engine is `faulty` from the tests: the echo engine, with log probabilities for prompts that contain "flood".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.load import LoadError, LoadSpecification, run
from common.processes import cpu_seconds, pss_bytes
from common.report import (
    add_output_arguments,
    bar,
    machine,
    median,
    number,
    progress,
    seconds,
    spread,
    table,
    write_json,
)
from common.subjects import OURS, Echo
from common.workbench import Workbench, WorkbenchError, Worker, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Self

_PLUGINS = Path(__file__).parent.parent / "tests" / "plugins"
#: Tokens that a slow client asks for: some 150 MB of events.
_FLOOD_TOKENS = 100_000
#: Bytes a second of a client that reads slowly, and seconds between two of its reads.
_SLOW_RATE, _SLOW_PAUSE = 10_000, 0.1
#: Requests of one load, some 8 s of it.
_REQUESTS = 2000
#: Seconds that clients get to be found slow.
_FILL_SECONDS = 240.0


@dataclass(frozen=True)
class Scenario:
    """So many slow clients, and what they read."""

    title: str
    clients: int
    bytes_per_second: int


SCENARIOS = {
    "1": Scenario("one client that does not read", 1, 0),
    "64": Scenario("64 clients that do not read", 64, 0),
    "slow": Scenario(f"one client that reads {_SLOW_RATE // 1000} kB/s", 1, _SLOW_RATE),
}


@dataclass(frozen=True)
class Flood(Echo):
    """The faulty engine in place of echo."""

    def command(self, kind: str, directory: Path, model: str, component: str, flags: Sequence[str]) -> list[str]:
        """Return the command line of a worker."""
        command = super().command(kind, directory, model, component, flags)
        command[command.index("echo")] = "faulty"
        return command

    def environment(self, kind: str) -> Mapping[str, str]:  # noqa: ARG002 - part of the protocol
        """Return where the faulty engine is found."""
        return {"PYTHONPATH": str(_PLUGINS)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/slow_clients.py --scenarios 1,slow --rounds 3",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of rounds; medians are shown (default: 3)"
    )
    parser.add_argument(
        "--scenarios",
        default="1,64,slow",
        metavar="LIST",
        help="scenarios, separated by commas: 1, 64, slow (default: all)",
    )
    parser.add_argument(
        "--push", action="store_true", help="use an engine that pushes its chunks, without backpressure"
    )
    add_output_arguments(parser)
    return parser.parse_args()


class SlowClients:
    """Connections that ask for much and read little, in the background of a ``with`` block."""

    def __init__(self, port: int, model: str, scenario: Scenario) -> None:
        self._port = port
        self._scenario = scenario
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "flood"}],
            "max_tokens": _FLOOD_TOKENS,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
        }
        content = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\n"
            f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._request = head.encode() + content
        self._connections: list[socket.socket] = []
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> None:
        for _ in range(self._scenario.clients):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self._port))
            connection.sendall(self._request)
            self._connections.append(connection)
        self._reader.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._reader.join()
        for connection in self._connections:
            connection.close()

    def _read(self) -> None:
        while self._scenario.bytes_per_second and not self._over.wait(_SLOW_PAUSE):
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.recv(int(self._scenario.bytes_per_second * _SLOW_PAUSE), socket.MSG_DONTWAIT)


class Watch:
    """Asks the worker's status server all the time of a ``with`` block how it is."""

    def __init__(self, status_port: int) -> None:
        self._url = f"http://127.0.0.1:{status_port}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        #: Seconds that ``/live`` took to answer, and by which the worker's event loop woke up late.
        self.answers: list[float] = []
        self.lags: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            started = time.monotonic()
            urllib.request.urlopen(f"{self._url}/live", timeout=60).read()
            self.answers.append(time.monotonic() - started)
            if len(self.answers) % 10 == 0:
                self.lags.append(self.metric("dynamo_worker_event_loop_lag_seconds"))

    def metric(self, name: str) -> float:
        """Return one metric of the worker."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=60) as answer:
            found = re.search(rf"^{name} (\S+)", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + _FILL_SECONDS
        while self.metric(name) != value:
            if time.monotonic() > deadline:
                raise WorkbenchError(f"{name} is {self.metric(name)}, not {value}, after {_FILL_SECONDS:g} s")
            time.sleep(0.2)


def _load(bench: Workbench, worker: Worker) -> float:
    result = run(LoadSpecification(bench.ports, worker.model, 32, _REQUESTS, 500, timeout=120.0, count_by_usage=True))
    if result.lost:
        raise WorkbenchError(f"lost {result.lost} of {len(result.records)}: {result.losses()}")
    return result.tokens_per_second


def _wait_at_rest(worker: Worker) -> None:
    """Wait until a worker uses next to no CPU time: buffers fill in steps, long after a send has blocked first."""
    deadline = time.monotonic() + _FILL_SECONDS
    used = 1.0
    while used > 0.05:
        if time.monotonic() > deadline:
            raise WorkbenchError(f"the worker still works for slow clients after {_FILL_SECONDS:g} s")
        before = cpu_seconds(worker.serving_pid())
        time.sleep(1)
        used = cpu_seconds(worker.serving_pid()) - before


def _round(bench: Workbench, worker: Worker, status_port: int, scenario: Scenario) -> dict[str, Any]:
    alone = _load(bench, worker)
    before = pss_bytes(worker.serving_pid())
    watch = Watch(status_port)
    with SlowClients(bench.port, worker.model, scenario):
        watch.wait("dynamo_worker_slow_clients", scenario.clients)
        _wait_at_rest(worker)
        filled = pss_bytes(worker.serving_pid())
        with watch:
            beside = _load(bench, worker)
        after = pss_bytes(worker.serving_pid())
        slow = watch.metric("dynamo_worker_slow_clients")
    watch.wait("dynamo_worker_in_flight", 0)
    if not worker.program.running:
        raise WorkbenchError(f"the worker has ended:\n{worker.program.log_tail()}")
    answers = sorted(watch.answers)
    return {
        "scenario": scenario.title,
        "alone_tokens_per_second": alone,
        "beside_tokens_per_second": beside,
        "ratio": beside / alone,
        "live_s": median(answers),
        "live_p99_s": answers[int(0.99 * (len(answers) - 1))] if answers else None,
        "event_loop_lags_s": watch.lags,
        "slow_clients": slow,
        "memory_before": before,
        "memory_filled": filled,
        "memory_after": after,
    }


def _report(rounds: Sequence[Mapping[str, Any]]) -> None:
    def rows() -> Iterator[list[str]]:
        for title in dict.fromkeys(round_["scenario"] for round_ in rounds):
            own = [round_ for round_ in rounds if round_["scenario"] == title]
            ratio = median(round_["ratio"] for round_ in own)
            lags = [max(round_["event_loop_lags_s"], default=0.0) for round_ in own]
            yield [
                title,
                spread([round_["alone_tokens_per_second"] for round_ in own]),
                spread([round_["beside_tokens_per_second"] for round_ in own]),
                spread([round_["ratio"] for round_ in own]),
                bar(ratio, at_least=0.9),
                seconds(median(round_["live_s"] for round_ in own)),
                seconds(max(round_["live_p99_s"] or 0.0 for round_ in own)),
                seconds(max(lags)),
                bar(median(lags), at_most=0.05),
                number(max(round_["memory_after"] - round_["memory_before"] for round_ in own) / 1e6, "MB"),
            ]

    table(
        f"Slow clients, medians (range) of {len(rounds) // len({r['scenario'] for r in rounds})} rounds",
        ["", "tokens/s alone", "beside", "ratio", "≥ 0.9", "/live", "p99", "most loop lag", "≤ 50 ms", "memory"],
        rows(),
    )


def main() -> int:
    """Run the benchmark."""
    arguments = _arguments()
    names = arguments.scenarios.split(",")
    if unknown := [name for name in names if name not in SCENARIOS]:
        print(f"slow_clients.py: --scenarios: expected some of {', '.join(SCENARIOS)}, got {unknown}", file=sys.stderr)
        return 2
    rounds: list[dict[str, Any]] = []
    try:
        (status_port,) = free_ports(1)
        flags = ["--system-host", "127.0.0.1", "--system-port", str(status_port), "--slow-client-timeout", "0"]
        flags += ["--heartbeat-timeout", "2.5"]  # the event loop's lag is taken five times as often
        with Workbench(Flood(), arguments.keep_logs) as bench:
            worker = bench.start(OURS, "flood", [*flags, *(["--push"] if arguments.push else [])])
            _load(bench, worker)
            for count in range(arguments.rounds):
                for name in names:
                    result = _round(bench, worker, status_port, SCENARIOS[name])
                    rounds.append(result)
                    progress(
                        f"round {count + 1} of {arguments.rounds}, {result['scenario']}: {result['ratio']:.2f} of "
                        f"{result['alone_tokens_per_second']:.0f} tokens/s, {result['slow_clients']:.0f} slow"
                    )
    except (WorkbenchError, LoadError) as error:
        print(f"slow_clients.py: {error}", file=sys.stderr)
        return 1
    _report(rounds)
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "slow_clients", vars(arguments), rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
