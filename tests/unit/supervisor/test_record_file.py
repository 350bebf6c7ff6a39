"""Records on disk: bounded, locked, never where or what another user has prepared."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_worker.supervisor import record_file
from dynamo_worker.supervisor.record_file import KEPT_BEGINNING, MOST_BYTES, RecordFile


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "records"


def opened(path: Path) -> int:
    return record_file.open_directory(str(path))


def lines(place: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def over(place: Path, *entries: dict) -> str:
    record = RecordFile.create(str(place), 100)
    for entry in entries:
        record.append(entry)
    record.close()
    return record.name


def test_directories_and_records_are_for_this_user_only(place):
    before = os.umask(0)
    try:
        record = RecordFile.create(str(place), 3)
    finally:
        os.umask(before)
    for path in (place.parent, place):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / record.name).stat().st_mode) == 0o600
    record.close()


def test_a_record_is_complete_on_disk_after_each_entry(place):
    record = RecordFile.create(str(place), 3)
    for number in range(3):
        record.append({"event": "x", "number": number})
        assert [entry["number"] for entry in lines(place, record.name)] == list(range(number + 1))
    record.close()


def test_a_long_record_loses_its_middle(place):
    record = RecordFile.create(str(place), 3)
    most = 0
    for number in range(20_000):
        record.append({"event": "x", "number": number})
        most = max(most, (place / record.name).stat().st_size)
    record.close()
    assert most <= MOST_BYTES + 4096
    found = lines(place, record.name)
    numbers = [entry["number"] for entry in found if entry["event"] == "x"]
    gaps = [entry["lines"] for entry in found if entry["event"] == "gap"]
    assert numbers[0] == 0
    assert numbers[-1] == 19_999
    assert numbers == sorted(set(numbers))
    assert len(gaps) == 1
    assert gaps[0] + len(numbers) == 20_000, "each entry that is missing is counted"
    assert sum(len(json.dumps({"event": "x", "number": n})) for n in numbers if n < 3000) > KEPT_BEGINNING / 2
    assert sorted(os.listdir(place)) == [record.name]


def test_a_long_entry_is_cut(place):
    name = over(place, {"event": "x", "t": 1.0, "text": "a" * 100_000})
    (entry,) = lines(place, name)
    assert entry == {"event": "x", "t": 1.0, "cut": True}


@pytest.mark.parametrize("rest", [b'{"event":"y","a', b"\xff\xfe\n", b"[1]\n", b'{"event":5}\n', b"[" * 100_000])
def test_what_is_damaged_is_left_out(place, rest):
    name = over(place, {"event": "x"})
    with (place / name).open("ab") as file:
        file.write(rest)
    directory = opened(place)
    descriptor = record_file.open_record(directory, name)
    assert [entry["event"] for entry in record_file.entries(record_file.read(descriptor))] == ["x"]
    os.close(descriptor)
    os.close(directory)


def test_the_last_ones_are_kept_and_those_of_living_workers(place):
    names = [over(place, {"event": "x"}) for _ in range(4)]
    alive = RecordFile.create(str(place), 100)
    more = [over(place, {"event": "x"}) for _ in range(3)]
    last = RecordFile.create(str(place), 2)
    assert set(os.listdir(place)) == {alive.name, more[-1], last.name}
    assert not set(names) & set(os.listdir(place))
    alive.close()
    last.close()


def test_who_writes_holds_a_lock(place):
    record = RecordFile.create(str(place), 3)
    gone = over(place, {"event": "x"})
    directory = opened(place)
    assert record_file.by_life(directory) == ([gone], [record.name])
    for number in range(20_000):  # replaced by a shorter file meanwhile
        record.append({"event": "x", "number": number})
    assert record_file.by_life(directory) == ([gone], [record.name])
    record.close()
    assert record_file.by_life(directory)[1] == []
    os.close(directory)


def test_a_kill_ends_the_lock_and_leaves_the_record(place):
    program = f"""
import os, signal
from dynamo_worker.supervisor.record_file import RecordFile
RecordFile.create({str(place)!r}, 3).append({{"event": "x"}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    directory = opened(place)
    ((name,), running) = record_file.by_life(directory)
    assert running == []
    assert lines(place, name) == [{"event": "x"}]
    os.close(directory)


def test_a_link_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "records").symlink_to("real")
    with pytest.raises(OSError):
        RecordFile.create(f"{tmp_path}/records/", 3)
    assert os.listdir(tmp_path / "real") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_another_users_directory(place):
    place.mkdir(parents=True)
    os.chown(place, 12345, 12345)
    with pytest.raises(PermissionError, match=r"another user \(12345\)"):
        RecordFile.create(str(place), 3)
    assert os.listdir(place) == []


@pytest.mark.parametrize("forge", ["link", "second name", "writable", "fifo", "other user"])
def test_forged_records_are_neither_read_nor_written(place, tmp_path, forge):
    name = over(place, {"event": "x"})
    target = place / name
    if forge == "link":
        target.rename(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / "elsewhere")
    elif forge == "second name":
        os.link(target, tmp_path / "second")
    elif forge == "writable":
        target.chmod(0o666)
    elif forge == "fifo":
        target.unlink()
        os.mkfifo(target)
    elif os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    else:
        os.chown(target, 12345, 12345)
    directory = opened(place)
    with pytest.raises(OSError):
        record_file.open_record(directory, name)
    with pytest.raises(OSError):
        RecordFile.reopen(str(place), name)
    assert record_file.by_life(directory) == ([], [])
    os.close(directory)


@pytest.mark.parametrize("name", ["../../etc/passwd", "dw-x.jsonl", ""])
def test_only_names_of_records_are_opened(place, name):
    place.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        RecordFile.reopen(str(place), name)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "ceph", "lustre"])
def test_file_systems_that_may_hang(place, monkeypatch, kind):
    monkeypatch.setattr(record_file, "_file_system", lambda device: kind)
    with pytest.raises(OSError, match="may hang"):
        RecordFile.create(str(place), 3)


def test_this_file_system_is_known(tmp_path):
    assert record_file._file_system(os.stat("/proc/self").st_dev) == "proc"
    assert not record_file._REMOTE.match(record_file._file_system(tmp_path.stat().st_dev))


def test_a_full_disk_leaves_a_record_that_can_be_read_and_continued(place, monkeypatch):
    record = RecordFile.create(str(place), 3)
    record.append({"event": "before"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        record.append({"event": "lost"})
    monkeypatch.undo()
    record.append({"event": "after"})
    assert [entry["event"] for entry in record.entries()] == ["before", "after"]
    record.close()


def test_a_full_disk_while_it_is_shortened_keeps_the_bound(place, monkeypatch):
    record = RecordFile.create(str(place), 3)
    create = record_file._create

    def full(directory: int, name: str) -> int:
        if name.endswith("~"):
            raise OSError(28, "No space left on device")
        return create(directory, name)

    monkeypatch.setattr(record_file, "_create", full)
    failures = 0
    for number in range(20_000):
        try:
            record.append({"event": "x", "number": number})
        except OSError:
            failures += 1
        assert (place / record.name).stat().st_size <= MOST_BYTES + 4096
    assert failures > 0
    record.close()


def test_the_default_place():
    assert record_file.default_directory({"XDG_STATE_HOME": "/s"}) == "/s/dynamo-worker/records"
    assert str(record_file.default_directory({})).endswith("/.local/state/dynamo-worker/records")
    assert record_file.default_directory({"XDG_STATE_HOME": "relative"}) == record_file.default_directory({})
