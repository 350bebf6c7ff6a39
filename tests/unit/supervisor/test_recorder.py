"""The flight record of real supervisors with fake workers, and what the recorder takes from messages."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dynamo_worker.supervisor import recorder as recording
from dynamo_worker.supervisor.early_settings import EarlySettings
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.last_exit import last_exit
from dynamo_worker.supervisor.recorder import Recorder
from dynamo_worker.supervisor.report import Log

from .conftest import wait_until

SERVING = "state=SERVING"


class Recorded:
    """A recorder and what it has written."""

    def __init__(self, place: Path, *flags: str) -> None:
        self.place = place
        self.lines: list[tuple[str, str, dict]] = []
        log = Log("test")
        self.recorder = Recorder(time.monotonic(), log)
        log._write = lambda level, message, fields: self.lines.append((level, message, fields))  # type: ignore[method-assign]
        self.recorder.open(EarlySettings([*flags]))

    def entries(self, event: str = "") -> list[dict]:
        (path,) = self.place.glob("dw-*.jsonl")
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for entry in found if event in ("", entry["event"])]


@pytest.fixture
def it(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path / "records", f"--record-dir={tmp_path / 'records'}")


def events_of(supervised) -> list[dict]:
    (path,) = (supervised.base / "records").glob("dw-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def end_of(supervised) -> dict:
    return [entry for entry in events_of(supervised) if entry["event"] == "end"][-1]


class TestMessages:
    def test_only_what_is_known_is_taken_from_a_message(self, it):
        it.recorder.take({"type": "step", "name": "engine", "seconds": 1.5, "prompt": "secret"}, time.monotonic())
        it.recorder.take({"type": "nonsense", "a": 1}, time.monotonic())
        (entry,) = it.entries("step")
        assert {key: value for key, value in entry.items() if key != "t"} == {
            "event": "step", "name": "engine", "seconds": 1.5,
        }  # fmt: skip
        assert len(it.entries()) == 2

    def test_texts_are_bounded_and_safe_and_without_secrets(self, it):
        error = "\x1b[31mred http://user:hunter2@host " + "x" * 5000
        it.recorder.take({"type": "hook", "hook": "drain", "error": error}, time.monotonic())
        (entry,) = it.entries("hook")
        assert "\x1b" not in entry["error"]
        assert "hunter2" not in entry["error"]
        assert len(entry["error"]) < 700

    @pytest.mark.parametrize(
        "value", [{str(n): {"a": {"b": {"c": 1}}} for n in range(1000)}, [[[[1]]]] * 1000, float("nan"), 1 << 80, None]
    )
    def test_whatever_a_library_sends_fits(self, it, value):
        it.recorder.take({"type": "state", "state": "SERVING", "counts": value, "deadline": value}, time.monotonic())
        (entry,) = it.entries("state")
        assert len(json.dumps(entry)) < 4096

    def test_a_flood_is_counted_not_written(self, it):
        for number in range(5000):
            it.recorder.take({"type": "hook", "hook": str(number)}, time.monotonic())
        it.recorder.end(0, ExitKind.STOPPED, "stopped")
        written = len(it.entries("hook"))
        assert written <= 250
        (suppressed,) = it.entries("suppressed")
        assert suppressed["entries"] + written == 5000

    def test_heartbeats_are_not_written_but_sampled(self, it):
        for number in range(1000):
            beat = {"type": "heartbeat", "in_flight": number, "counts": {"completed": 5}, "lag": 0.5}
            it.recorder.take(beat, time.monotonic())
        it.recorder.sample(resident=1)
        assert [entry["event"] for entry in it.entries()] == ["start", "sample"]
        (sample,) = it.entries("sample")
        assert (sample["in_flight"], sample["counts"], sample["lag"]) == (999, {"completed": 5}, 0.5)


class TestTrouble:
    def test_a_place_that_cannot_be_used_costs_one_line(self, tmp_path):
        (tmp_path / "file").touch()
        it = Recorded(tmp_path, f"--record-dir={tmp_path / 'file'}")
        it.recorder.write("x")
        it.recorder.end(0, ExitKind.STOPPED, "stopped")
        it.recorder.close()
        ((level, message, fields),) = it.lines
        assert (level, message) == ("WARNING", "No flight record")
        assert "Not a directory" in fields["reason"]

    def test_without_a_home_it_is_no_warning(self, tmp_path, monkeypatch):
        monkeypatch.delenv("DYN_WORKER_RECORD_DIR", raising=False)
        monkeypatch.setattr(recording, "default_directory", lambda environ: None)
        ((level, message, _),) = Recorded(tmp_path).lines
        assert (level, message) == ("INFO", "No flight record")

    def test_no_records(self, tmp_path):
        it = Recorded(tmp_path, f"--record-dir={tmp_path / 'records'}", "--record-keep=0")
        assert not it.recorder.active
        assert it.lines == []
        assert not (tmp_path / "records").exists()

    def test_a_full_disk_costs_one_line_and_the_end_is_tried_again(self, it, monkeypatch):
        def full(entry: object) -> None:
            raise OSError(28, "No space left on device")

        file = it.recorder._file
        monkeypatch.setattr(file, "append", full)
        for _ in range(3):
            it.recorder.write("x")
        monkeypatch.undo()
        it.recorder.end(0, ExitKind.STOPPED, "stopped")
        assert [(level, message) for level, message, _ in it.lines] == [("WARNING", "Flight record incomplete")]
        assert [entry["event"] for entry in it.entries()] == ["start", "end"]


class TestSupervised:
    def test_a_worker_that_ends_by_itself(self, supervised):
        supervised.start(SERVING, "exit-message=3:port 8000 is in use", "exit=3")
        assert supervised.wait() == 3
        end = end_of(supervised)
        assert (end["code"], end["reason"], end["by"]) == (3, "port 8000 is in use", "supervisor")
        assert end["kind"] == "start-failed"
        (death,) = [entry for entry in events_of(supervised) if entry["event"] == "death"]
        assert (death["what"], death["exit_code"]) == ("worker", 3)

    def test_kill_of_the_worker(self, supervised):
        supervised.start(SERVING, "die=9")
        assert supervised.wait() == 137
        assert end_of(supervised)["kind"] in ("killed-by-signal", "out-of-memory")
        (death,) = [entry for entry in events_of(supervised) if entry["event"] == "death"]
        assert (death["what"], death["signal"]) == ("worker", "SIGKILL")

    def test_a_command_that_does_not_exist(self, supervised):
        supervised.start(worker="/nonexistent")
        code = supervised.wait()
        assert end_of(supervised)["code"] == code

    def test_kill_of_the_supervisor(self, supervised):
        supervised.start(SERVING, "arrived", "sleep=60")
        worker = supervised.worker
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        supervised.gone()
        wait_until(lambda: any(entry["event"] == "end" for entry in events_of(supervised)), 5.0, "the end")
        end = end_of(supervised)
        assert (end["code"], end["kind"], end["by"]) == (137, "supervisor-killed", "guardian")
        deaths = {entry["what"]: entry for entry in events_of(supervised) if entry["event"] == "death"}
        assert deaths["supervisor"]["pid"] == supervised.pid
        assert (deaths["worker"]["pid"], deaths["worker"]["signal"]) == (worker, "SIGKILL")
        assert any(entry["event"] == "cleaned" for entry in events_of(supervised))

    def test_kill_of_the_guardian(self, supervised):
        supervised.start(SERVING, "arrived", "sleep=60")
        guardian = supervised.guardian
        os.kill(guardian, signal.SIGKILL)
        assert supervised.wait() == 1
        assert end_of(supervised)["kind"] == "guardian-killed"
        deaths = {entry["what"]: entry for entry in events_of(supervised) if entry["event"] == "death"}
        assert (deaths["guardian"]["pid"], deaths["guardian"]["signal"]) == (guardian, "SIGKILL")

    def test_a_third_signal_leaves_one_end(self, supervised):
        supervised.start(SERVING, "arrived", "sleep=60")
        for _ in range(3):
            supervised.signal(signal.SIGTERM)
            time.sleep(0.15)
        assert supervised.wait() == 143
        supervised.gone()
        ends = [entry for entry in events_of(supervised) if entry["event"] == "end"]
        assert [end["kind"] for end in ends] == ["forced-stop"]
        wait_until(lambda: any(e["event"] == "cleaned" for e in events_of(supervised)) or ends[0]["cleaned"], 5.0)

    def test_a_directory_that_cannot_be_written_harms_nothing(self, supervised):
        (supervised.base / "records").symlink_to("/nonexistent/place")
        supervised.start(SERVING, "arrived", "exit=0")
        assert supervised.wait() == 1
        assert supervised.text.count("No flight record") == 1
        (supervised.base / "records").unlink()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_disk_that_fills_up_harms_nothing(self, supervised):
        supervised.patch(
            """
            import os
            write = os.write
            def full(descriptor, data):
                if b'"event":"state"' in data or b'"event":"end"' in data:
                    raise OSError(28, "No space left on device")
                return write(descriptor, data)
            os.write = full
            """
        )
        supervised.start(SERVING, "state=DRAINING@9", "exit=0")
        assert supervised.wait() == 0
        assert supervised.text.count("Flight record incomplete") == 1

    def test_the_next_worker_learns_of_the_last_end(self, supervised):
        place = str(supervised.base / "records")
        before = time.time()
        assert last_exit(place) is None
        supervised.start(SERVING, "arrived", "die=9")
        supervised.wait()
        last = last_exit(place)
        assert last is not None
        assert before - 1 < last.at < time.time() + 1
        assert (last.code, last.kind.value) in ((137, "killed-by-signal"), (137, "out-of-memory"))

    def test_a_living_worker_is_no_last_end(self, supervised):
        supervised.start(SERVING, "arrived", "sleep=60")
        assert last_exit(str(supervised.base / "records")) is None
        supervised.signal(signal.SIGTERM)

    def test_supervisor_and_guardian_killed_at_once(self, supervised):
        """The next start completes the record."""
        supervised.start(SERVING, "arrived", "sleep=60")
        first, guardian = supervised.process, supervised.guardian
        record = events_of(supervised)
        assert not any(entry["event"] == "end" for entry in record)
        os.kill(guardian, signal.SIGSTOP)
        os.kill(supervised.pid, signal.SIGKILL)
        os.kill(guardian, signal.SIGKILL)
        first.wait()
        last = last_exit(str(supervised.base / "records"))
        assert last is not None
        assert (last.code, last.kind) == (137, ExitKind.ALL_KILLED)
        (path,) = (supervised.base / "records").glob("dw-*.jsonl")
        supervised.start(SERVING, "arrived", "sleep=60")
        wait_until(lambda: '"event":"end"' in path.read_text(), 30.0, "the sweep to complete the record")
        found = [json.loads(line) for line in path.read_text().splitlines()]
        (cleaned,) = [entry for entry in found if entry["event"] == "cleaned"]
        assert cleaned["by"] == "next start"
        assert found[-1]["kind"] == "all-killed"
        supervised.signal(signal.SIGTERM)


def test_a_reference_that_is_forged_leads_nowhere(tmp_path):
    victim = tmp_path / "victim.jsonl"
    victim.write_text("mine\n")
    with pytest.raises(OSError):
        recording.complete((str(tmp_path), "victim.jsonl"), {})
    assert victim.read_text() == "mine\n"


def test_reference_of_nonsense(tmp_path):
    (tmp_path / "record").write_text("[1, 2]")
    directory = os.open(tmp_path, os.O_RDONLY)
    assert recording.reference(directory) is None
    os.close(directory)
