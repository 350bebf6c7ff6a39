"""The engine's own behaviour, behind a real frontend."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from dynamo_worker_reverse.core import reverse

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Cluster, Worker


@pytest.fixture
def engine_args() -> list[str]:
    return ["--engine", "reverse", "--grace-period", "0"]


def serve(cluster: Cluster, *arguments: str, **environment: str) -> Worker:
    cluster.start_frontend()
    worker = cluster.worker(*arguments, **environment)
    cluster.wait_model()
    return worker


def test_characters_are_reversed_not_bytes() -> None:
    tokens = [byte + 3 for byte in "Grüße".encode()]
    assert bytes(token - 3 for token in reverse(tokens)).decode() == "eßürG"


def test_answers(cluster: Cluster) -> None:
    serve(cluster)
    whole = cluster.ask(100, "Grüße, world")
    assert (whole.text, whole.finish_reason) == ("dlrow ,eßürG", "stop")
    cut = cluster.ask(5, "Grüße, world")
    assert (cut.text, cut.finish_reason) == ("dlrow", "length")


def test_usage_is_written_by_the_drain(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    worker = serve(cluster, "--usage-file", str(file))
    cluster.ask(100, "abc")
    assert not file.exists()
    worker.signal(signal.SIGTERM)
    assert worker.wait_gone() == 0
    usage = [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
    assert 3 in usage


def test_a_crash_leaves_a_note(cluster: Cluster, tmp_path: Path) -> None:
    worker = serve(cluster, CRASH_NOTE_DIR=str(tmp_path / "notes"))
    worker.signal(signal.SIGKILL, worker.child(r"dynamo_worker_reverse\.core"))
    assert worker.wait_gone() == 1
    (path,) = (tmp_path / "notes").iterdir()
    note = json.loads(path.read_text())
    assert note["error"] == "EngineDeadError"
    assert "died" in note["message"]


def test_the_crash_note_can_be_left_out(cluster: Cluster, tmp_path: Path) -> None:
    worker = serve(cluster, "--no-plugin", "crash-note", CRASH_NOTE_DIR=str(tmp_path / "notes"))
    worker.signal(signal.SIGKILL, worker.child(r"dynamo_worker_reverse\.core"))
    assert worker.wait_gone() == 1
    assert not (tmp_path / "notes").exists()
