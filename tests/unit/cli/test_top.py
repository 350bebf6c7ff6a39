"""`dynamo-worker top`: what it understands, follows and shows, whatever the status servers answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import pytest

from dynamo_worker.address import Address
from dynamo_worker.cli import main
from dynamo_worker.cli.top import command, screen, status_client, table, watch
from dynamo_worker.cli.top.samples import Sample, from_health, from_metrics, one_line
from dynamo_worker.cli.top.watch import Watch, WatchedWorker
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.discovery.fleet import FoundWorker
from dynamo_worker.host.drain_phase import DrainPhase
from dynamo_worker.host.requests.serving import RequestRegistry
from dynamo_worker.host.status.metrics import WorkerMetrics
from dynamo_worker.lifecycle import State

READY = """\
dynamo_worker_state{state="SERVING"} 1.0
dynamo_worker_ready 1.0
dynamo_worker_in_flight 3.0
dynamo_worker_chunks_total %s
"""


def metrics():
    made = WorkerMetrics(RequestRegistry())
    made.set_state(State.SERVING)
    made.ready.set(1)
    made.start_seconds.set(2.5)
    made.event_loop_lag.set(0.012)
    made.set_info(version="0.2.0", engine="echo", model='a "b" \\ c', worker_id="77")
    return made


class TestSamples:
    def test_what_a_worker_exposes(self):
        text = metrics().exposition() + 'dynamo_component_uptime_seconds{dynamo_namespace="a"} 42.5\n'
        found = from_metrics(text)
        assert (found.state, found.phase, found.in_flight, found.chunks) == ("SERVING", "serving", 0, 0.0)
        assert (found.lag_s, found.start_s, found.age_s, found.ready) == (0.012, 2.5, 42.5, True)
        assert (found.engine, found.version, found.worker_id) == ("echo", "0.2.0", "77")

    def test_a_drain(self):
        made = metrics()
        made.set_drain_phase(DrainPhase.DRAINED)
        assert from_metrics(made.exposition()).phase == "drained"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "dynamo_worker_in_flight NaN",
            "dynamo_worker_in_flight",
            "dynamo_worker_in_flight one",
            'dynamo_worker_state{state="\x1b[31m"} 1',
            'dynamo_worker_state{state="' + "x" * 100_000,
            "dynamo_worker_chunks_total 1e999",
            "\0" * 1000,
        ],
    )
    def test_garbage_says_nothing(self, text):
        assert from_metrics(text) == Sample()

    def test_a_long_line_takes_no_time(self):
        started = time.monotonic()
        from_metrics('dynamo_worker_info{a="' + '\\"' * 2_000_000)
        assert time.monotonic() - started < 2

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (b'{"state": "SERVING", "reason": "drained\\non request"}', ("SERVING", "drained on request")),
            (b'{"state": "NONSENSE"}', (None, None)),
            (b'{"state": ["SERVING"], "reason": 3}', (None, None)),
            (b"[]", (None, None)),
            (b"\xff", (None, None)),
            (b"[" * 100_000, (None, None)),
        ],
    )
    def test_health(self, text, expected):
        assert from_health(text) == expected

    def test_texts_cannot_act_on_the_terminal(self):
        assert "\x1b" not in one_line("\x1b[31mred")
        assert len(one_line("x" * 1000)) <= 200


@contextlib.asynccontextmanager
async def serving(answers):
    """Serve prepared answers by path; None: never answer. Yields the address."""

    writers = []

    async def serve(reader, writer):
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            answer = answers.get(path, b"HTTP/1.0 404 Not Found\r\n\r\n")
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


def http(body, status=200):
    return f"HTTP/1.1 {status} X\r\ncontent-type: text/plain\r\n\r\n{body}".encode()


def look(answers, timeout=5.0):
    async def ask():
        async with serving(answers) as address:
            return await status_client.look(address, timeout)

    return asyncio.run(ask())


class TestStatusClient:
    def test_a_ready_worker_is_asked_once(self):
        found = look({"/metrics": http(READY % 7), "/health": None})
        assert (found.state, found.ready, found.in_flight, found.chunks) == ("SERVING", True, 3, 7.0)

    def test_a_worker_that_is_not_ready_says_why(self):
        text = (READY % 7).replace("ready 1.0", "ready 0.0")
        health = http('{"status": "notready", "state": "SERVING", "reason": "drained on request"}', 503)
        found = look({"/metrics": http(text), "/health": health})
        assert (found.state, found.ready, found.reason) == ("SERVING", False, "drained on request")

    def test_a_worker_that_starts_has_no_metrics(self):
        report = http('{"status": "notready", "state": "STARTING"}', 503)
        found = look({"/metrics": report, "/health": report})
        assert (found.state, found.ready, found.in_flight) == ("STARTING", False, None)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (None, "no answer within 0.2 s"),
            (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
            (b"", "does not speak HTTP"),
            (b"\xff" * 1000, "does not speak HTTP"),
            (http("hello"), "/metrics answers with HTTP status 200"),
            (http("x" * (5 << 20)), "more than 4 MiB"),
        ],
    )
    def test_others(self, answer, message):
        with pytest.raises(status_client.SilentError, match=message):
            look({"/metrics": answer}, 0.2 if answer is None else 5.0)

    def test_nobody_listens(self):
        with pytest.raises(status_client.SilentError, match="no answer: "):
            asyncio.run(status_client.look(Address("127.0.0.1", 1), 5.0))


def found(instance="77", status=None, **fields):
    return FoundWorker("prod", "backend", instance, ["llama"], ["generate"], status, **fields)


class TestWatch:
    def test_figures_rates_and_a_worker_that_hangs(self, monkeypatch):
        monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.5)

        async def run():
            answers = {"/metrics": http(READY % 100)}
            async with serving(answers) as address, serving({"/metrics": None}) as deaf:
                following = Watch(lambda: {"77": found("77", address), "88": found("88", deaf)})
                started = time.monotonic()
                await following.refresh(0.2)
                assert time.monotonic() - started < 0.45  # not as long as the deaf one is given
                worker = following.workers["77"]
                assert (worker.sample.in_flight, worker.chunk_rate) == (3, None)
                answers["/metrics"] = http(READY % 200)
                await asyncio.sleep(0.4)
                await following.refresh(0.2)
                assert 100 < worker.chunk_rate < 250
                await asyncio.sleep(0.3)
                assert following.workers["88"].problem == "no answer within 0.5 s"
                answers["/metrics"] = http(READY % 5)  # a restart behind the same id: never less than nothing
                await following.refresh(0.2)
                assert worker.chunk_rate == 0

        asyncio.run(run())

    def test_gone_back_and_forgotten(self, monkeypatch):
        monkeypatch.setattr(watch, "_DISCOVERY_INTERVAL", 0.0)
        known = {"77": found("77")}

        async def run():
            following = Watch(lambda: dict(known))
            await following.refresh(1)
            assert following.workers["77"].gone_at is None
            known.clear()
            await following.refresh(1)
            assert following.workers["77"].gone_at is not None
            known["77"] = found("77")
            await following.refresh(1)
            assert following.workers["77"].gone_at is None
            known.clear()
            await following.refresh(1)
            monkeypatch.setattr(watch, "GONE_SECONDS", 0.0)
            await following.refresh(1)
            assert following.workers == {}

        asyncio.run(run())

    @pytest.mark.parametrize("expired", [True, False])
    def test_a_restart_is_a_new_worker_at_the_same_address(self, monkeypatch, expired):
        monkeypatch.setattr(watch, "_DISCOVERY_INTERVAL", 0.0)
        place = Address("127.0.0.1", 1)
        known = {"77": found("77", place)}

        async def run():
            following = Watch(lambda: dict(known))
            await following.refresh(1)
            assert following.workers["77"].restarted_at is None
            if expired:
                known.clear()
            known["88"] = found("88", place)
            await following.refresh(1)
            assert following.workers["88"].restarted_at is not None
            assert ("77" in following.workers) is not expired

        asyncio.run(run())

    def test_another_worker_at_the_address_is_not_mistaken_for_it(self):
        async def run():
            text = READY % 1 + 'dynamo_worker_info{worker_id="99"} 1.0\n'
            async with serving({"/metrics": http(text)}) as address:
                following = Watch(lambda: {"77": found("77", address)})
                await following.refresh(2)
                worker = following.workers["77"]
                assert (worker.problem, worker.sample) == ("another worker answers there, 99", None)

        asyncio.run(run())

    def test_discovery_that_fails_or_hangs_keeps_what_is_known(self, monkeypatch):
        monkeypatch.setattr(watch, "_DISCOVERY_INTERVAL", 0.0)
        hang = threading.Event()
        outcomes = [lambda: {"77": found("77")}, lambda: 1 / 0 and {}, hang.wait]

        def discover():
            if len(outcomes) == 2:
                outcomes.pop(0)
                raise OSError("connection refused")
            return outcomes.pop(0)()

        async def run():
            following = Watch(discover)
            await following.refresh(1)
            assert following.trouble is None
            await following.refresh(1)
            assert (following.trouble, list(following.workers)) == ("connection refused", ["77"])
            monkeypatch.setattr(watch, "_DISCOVERY_SECONDS", 1.0)
            started = time.monotonic()
            await following.refresh(1)
            assert time.monotonic() - started < 0.5
            assert following.trouble.startswith("it has not answered for")
            assert list(following.workers) == ["77"]

        asyncio.run(run())
        hang.set()


def watched(instance="77", sample=None, **values):
    made = WatchedWorker(found(instance, Address("10.0.0.7", 9090)), sample)
    for name, value in values.items():
        setattr(made, name, value)
    return made


SERVING = Sample("SERVING", "serving", 3, 10.0, 0.002, 12.34, 3700.0, True, None, "77", "llama", "echo", "0.2.0")
BUSY = Sample("SERVING", "serving", 9, ready=True, lag_s=0.5, age_s=5.0)
DRAINED = Sample("SERVING", "drained", 0, ready=False, reason="drained on request")


class TestTable:
    def test_a_row(self):
        cells = dict(zip(table.HEADINGS, table.row(watched(sample=SERVING, chunk_rate=99.6), 0.0), strict=True))
        assert cells == {
            "WORKER": "backend/77",
            "MODEL": "llama",
            "STATUS AT": "10.0.0.7:9090",
            "STATE": "SERVING",
            "READY": "yes",
            "IN FLIGHT": "3",
            "CHUNKS/S": "100",
            "LAG": "2 ms",
            "START": "12.3 s",
            "AGE": "1 h 1 min",
            "NOTE": "",
        }
        assert table.row(watched(sample=SERVING), 0.0, namespaces=True)[0] == "prod/backend/77"

    @pytest.mark.parametrize(
        ("worker", "state", "note"),
        [
            (watched(sample=DRAINED), "drained", "drained on request"),
            (watched(sample=SERVING, gone_at=88.0), "gone", "left discovery 12 s ago, was SERVING"),
            (watched(gone_at=88.0), "gone", "left discovery 12 s ago"),
            (watched(sample=SERVING, problem="no answer within 2 s"), "no answer", "no answer within 2 s"),
            (watched(), "asking", ""),
            (WatchedWorker(found()), "no answer", "discovery does not say where its status server is"),
            (watched(sample=Sample(in_flight=1)), "unknown", ""),
            (watched(sample=SERVING, restarted_at=40.0), "SERVING", "restarted 1 min ago"),
        ],
    )
    def test_what_is_wrong(self, worker, state, note):
        assert (table.label(worker), table.note(worker, 100.0)) == (state, note)
        if state in ("gone", "no answer"):
            assert table.row(worker, 100.0)[4:10] == ["-"] * 6  # no figures that are no longer true

    @pytest.mark.parametrize(
        ("order", "expected"),
        [
            ("load", ["busy", "idle", "drained", "deaf"]),
            ("rate", ["idle", "busy", "drained", "deaf"]),
            ("lag", ["busy", "idle", "drained", "deaf"]),
            ("age", ["busy", "idle", "drained", "deaf"]),
            ("state", ["deaf", "drained", "busy", "idle"]),
            ("name", ["busy", "deaf", "drained", "idle"]),
        ],
    )
    def test_orders(self, order, expected):
        workers = [
            watched("deaf", problem="no answer"),
            watched("idle", SERVING, chunk_rate=50.0),
            watched("drained", DRAINED),
            watched("busy", BUSY, chunk_rate=1.0),
        ]
        assert [worker.found.instance for worker in sorted(workers, key=table.ORDERS[order])] == expected

    def test_the_summary(self):
        workers = [watched("1", SERVING, chunk_rate=10.0), watched("2", BUSY), watched("3", SERVING, gone_at=1.0)]
        assert table.summary(workers) == "2 workers: 2 SERVING, 1 gone; 12 in flight, 10 chunks/s"
        assert table.summary([]) == "0 workers; 0 in flight, 0 chunks/s"

    def test_hundreds_of_workers_on_a_low_screen(self):
        from rich.console import Console

        workers = [watched(f"{number}", SERVING) for number in range(299)] + [watched("999", DRAINED)]
        console = Console(width=120, height=24, record=True, force_terminal=True, markup=False, highlight=False)
        console.print(screen.draw("title", workers, None, console.height))
        lines = console.export_text().splitlines()
        assert len(lines) == 24
        assert lines[-1].startswith("… 280 more, 1 of them not ready")
        assert lines[1].startswith("300 workers: 299 SERVING, 1 drained; 897 in flight")

    def test_json_keeps_its_keys(self):
        assert table.as_json(watched(), 0.0).keys() == table.as_json(watched(sample=SERVING), 0.0).keys()
        assert json.loads(json.dumps(table.as_json(watched(sample=SERVING), 0.0)))["age_s"] == 3700.0


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["localhost:9090", "--namespace", "x"], "--namespace has no effect on addresses"),
            (["nonsense:x"], "expected HOST:PORT"),
            (["--interval", "0"], "expected a number of seconds between 0.2 and 3600"),
            (["--sort", "size"], "invalid choice: 'size'"),
            (["--discovery-backend", "mem"], "invalid choice: 'mem'"),
        ],
    )
    def test_wrong_arguments(self, capsys, arguments, message):
        assert main.main(["top", *arguments]) == ExitCode.USAGE
        assert message in capsys.readouterr().err

    def test_discovery_that_nobody_outside_can_read(self, capsys, monkeypatch):
        monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "mem")
        assert main.main(["top"]) == ExitCode.USAGE
        assert "discovery 'mem' cannot be read from outside" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "suffix", "expected"),
        [("", "", "dynamo"), ("prod", "", "prod"), ("prod", "v2", "prod*"), ("prod-v2", "v2", "prod*")],
    )
    def test_the_namespace_of_the_environment(self, monkeypatch, name, suffix, expected):
        monkeypatch.setenv("DYN_NAMESPACE", name)
        monkeypatch.setenv("DYN_NAMESPACE_WORKER_SUFFIX", suffix)
        assert command._own_namespace() == expected

    def test_an_address_where_nobody_listens(self, capsys, monkeypatch):
        monkeypatch.setattr(command, "ONCE_SECONDS", 0.01)
        assert main.main(["top", "127.0.0.1:1", "--once", "--json"]) == 0
        (worker,) = json.loads(capsys.readouterr().out)["workers"]
        assert (worker["status_address"], worker["state"], worker["ready"]) == ("127.0.0.1:1", "no answer", None)
