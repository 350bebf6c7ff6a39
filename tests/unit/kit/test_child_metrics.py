"""Metrics that an engine's processes write into files: of ours only, whatever else lies there."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dynamo_worker import StartError
from dynamo_worker.kit import child_metrics
from dynamo_worker.kit.child_metrics import VARIABLE, ChildCollector, expected, share

#: A process with a counter and a gauge, which waits for the end of its input.
CHILD = """
import sys
from prometheus_client import Counter, Gauge
counter = Counter("lmcache:hits", "Hits", ["tier"])
counter.labels("cpu").inc(int(sys.argv[1]))
Gauge("lmcache:size", "Size", multiprocess_mode="livesum").set(2)
Counter("other:hits", "Hits").inc()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "removed at the end of the test, too")
    monkeypatch.delenv(VARIABLE)


class Children:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: list[subprocess.Popen[str]] = []
        self.registry = CollectorRegistry()
        self.registry.register(ChildCollector(str(directory), "lmcache:"))

    def start(self, hits: int) -> subprocess.Popen[str]:
        environment = {**os.environ, VARIABLE: str(self.directory)}
        command = [sys.executable, "-c", CHILD, str(hits)]
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def end(self, child: subprocess.Popen[str]) -> None:
        child.communicate("")
        self.running.remove(child)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path)
    yield children
    for child in list(children.running):
        children.end(child)


def test_processes_add_up_and_those_that_have_ended_do_not(children: Children) -> None:
    first = children.start(3)
    children.start(4)
    assert 'lmcache:hits_total{tier="cpu"} 7.0' in children.text()
    assert "lmcache:size 4.0" in children.text()
    assert "other:hits" not in children.text()
    children.end(first)
    assert any(str(first.pid) in name for name in os.listdir(children.directory)), "its file is left"
    assert 'lmcache:hits_total{tier="cpu"} 4.0' in children.text()


def test_files_of_other_workers_do_not_count(children: Children) -> None:
    """The operator's directory may be shared; an earlier worker may have left files."""
    child = children.start(3)
    (source,) = [path for path in children.directory.iterdir() if path.name == f"counter_{child.pid}.db"]
    for pid in (1, os.getppid(), os.getpid(), 4_194_303):
        (children.directory / f"counter_{pid}.db").write_bytes(source.read_bytes())
    assert 'lmcache:hits_total{tier="cpu"} 3.0' in children.text()


def test_a_broken_file_hides_no_other(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    children.start(3)
    other = children.start(4)
    (children.directory / f"counter_{other.pid}.db").write_bytes(struct.pack("iii", 64, 0, 1000) + bytes(52))
    for _ in range(2):
        assert 'lmcache:hits_total{tier="cpu"} 3.0' in children.text()
    warnings = [r.getMessage() for r in caplog.records if "Metrics of a process cannot be read" in r.getMessage()]
    assert len(warnings) == 1, "each file is reported once"


def test_a_file_without_end_is_not_read(children: Children) -> None:
    child = children.start(3)
    with open(children.directory / f"histogram_{child.pid}.db", "wb") as file:
        file.truncate(1 << 34)
    assert 'lmcache:hits_total{tier="cpu"} 3.0' in children.text()


def test_no_directory_at_all(tmp_path: Path) -> None:
    assert Children(tmp_path / "missing").text() == ""


def test_the_directory_is_the_workers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child_metrics.RUN_DIR, str(tmp_path))
    announced = expected()
    assert Path(announced[VARIABLE]).is_dir(), "preloaded modules may have metrics already"
    directory = share(tmp_path)
    assert announced == {VARIABLE: directory} == {VARIABLE: os.environ[VARIABLE]}
    assert Path(directory).parent == tmp_path
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700


def test_the_operators_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "metrics"
    monkeypatch.setenv(VARIABLE, str(given))
    assert share(tmp_path / "private") == str(given)
    assert given.is_dir()
    assert not (tmp_path / "private").exists()


def test_without_a_supervisor_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(child_metrics.RUN_DIR, raising=False)
    assert expected() == {}


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "metrics"))
    with pytest.raises(StartError, match=r"file/metrics for metrics cannot be made: Not a directory"):
        share(tmp_path)
