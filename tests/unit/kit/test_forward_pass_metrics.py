"""When forward-pass metrics are published, and that they reach the runtime and tests as they were sent."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker.kit import forward_pass_metrics
from dynamo_worker.kit.push_engine import PushEngine
from dynamo_worker.testing.forward_passes import decode, is_idle

PORT, TRACE = "DYN_FORWARDPASS_METRIC_PORT", "DYN_FPM_TRACE"


@pytest.mark.parametrize(
    ("flags", "environment", "wanted", "trace"),
    [
        ((), {}, False, None),
        ((), {PORT: "20380"}, True, None),
        ((), {PORT: ""}, False, None),
        ((), {TRACE: "1"}, True, "1"),
        ((), {TRACE: " Yes "}, True, "1"),
        ((), {TRACE: "off"}, False, "0"),
        ((), {TRACE: "sometimes"}, False, "0"),
        ((), {TRACE: "off", PORT: "20380"}, True, "0"),
        (("--fpm-trace",), {}, True, "1"),
        (("--fpm-trace",), {TRACE: "0"}, True, "1"),
        (("--no-fpm-trace",), {TRACE: "1"}, False, "0"),
    ],
)
def test_who_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[str, ...],
    environment: dict[str, str],
    wanted: bool,
    trace: str | None,
) -> None:
    """The runtime reads the variable, whoever set it."""
    for name in (PORT, TRACE):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    parser = argparse.ArgumentParser()
    forward_pass_metrics.add_flag(parser.add_argument_group("worker"))
    assert forward_pass_metrics.wanted(parser.parse_args(flags)) is wanted
    assert os.environ.get(TRACE) == trace
    assert ("are not traced" in caplog.text) is ("sometimes" in environment.values())


class Relay:
    """Takes the place of the runtime's relay."""

    made: list[Relay]

    def __init__(self, endpoint: Any, source: str) -> None:
        self.endpoint, self.source, self.ended = endpoint, source, False
        Relay.made.append(self)

    def shutdown(self) -> None:
        self.ended = True


class Engine(PushEngine[Any]):
    """An engine whose ranks publish."""

    NAME = "toy"

    async def launch(self) -> Any:
        raise NotImplementedError

    def describe(self, started: Any) -> Any:
        raise NotImplementedError

    async def answer(self, started: Any, job: Any) -> None:
        raise NotImplementedError

    def processes(self) -> list[int]:
        return []

    def progress(self) -> int:
        return 0


@pytest.mark.parametrize("ranks", [[], [0], [2, 3]])
def test_every_rank_on_this_machine_is_relayed_until_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: list[int]
) -> None:
    """Also when no router reads KV events and load."""
    Relay.made = []
    monkeypatch.setattr("dynamo.llm.FpmEventRelay", Relay)
    address = forward_pass_metrics.address(tmp_path)
    for rank in ranks:
        Path(f"{address.removeprefix('ipc://')}.{rank}").touch()
    (tmp_path / "kv-events-inproc0").touch()
    context: Any = SimpleNamespace(private_dir=tmp_path, events_wanted=False)
    engine: Any = Engine.__new__(Engine)
    PushEngine.__init__(engine, argparse.Namespace(), context)
    endpoint: Any = object()
    asyncio.run(engine.attach(endpoint, None))
    assert [relay.source for relay in Relay.made] == [f"{address}.{rank}" for rank in ranks]
    assert all(relay.endpoint is endpoint for relay in Relay.made)
    engine.stop()
    assert all(relay.ended for relay in Relay.made)


RECORDED = json.loads((Path(__file__).parents[1] / "data" / "forward_passes.json").read_text())


@pytest.mark.parametrize(("number", "idle"), [(0, False), (1, True)])
def test_what_dynamos_own_worker_encoded_is_read(number: int, idle: bool) -> None:
    message = decode(bytes.fromhex(RECORDED[number]["encoded"]))
    assert message == RECORDED[number]["message"]
    assert is_idle(message) is idle


@pytest.mark.parametrize("data", ["c3", "01ff", "93010203"])
def test_what_is_no_message(data: str) -> None:
    with pytest.raises(ValueError, match=r"unexpected|too many"):
        decode(bytes.fromhex(data))
