from __future__ import annotations

import json
import os
import socket
import stat

import pytest

from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.linux import Process


def test_registrations_come_back(tmp_path):
    ledger.record_registration(tmp_path, "file", 0x4EC5C2A6E8130C29, root=tmp_path / "kv")
    ledger.record_registration(tmp_path, "etcd", 5676156927484300329)
    assert ledger.registrations(tmp_path) == [
        {"kind": "registration", "backend": "file", "instance": "4ec5c2a6e8130c29", "root": str(tmp_path / "kv")},
        {"kind": "registration", "backend": "etcd", "instance": "4ec5c2a6e8130c29"},
    ]


def test_a_relative_root_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger.record_registration("", "file", "ABCDEF0123456789", root="kv")
    (entry,) = ledger.registrations(tmp_path)
    assert (entry["root"], entry["instance"]) == (str(tmp_path / "kv"), "abcdef0123456789")


def test_small_ids_have_all_their_digits(tmp_path):
    """File names hold the id as the runtime prints it: hexadecimal, without leading zeros."""
    ledger.record_registration(tmp_path, "file", 0xABC_DEF01, root="/x")
    assert ledger.registrations(tmp_path)[0]["instance"] == "abcdef01"


def test_torn_and_foreign_lines_are_skipped(tmp_path):
    ledger.record_registration(tmp_path, "file", 1, root="/x")
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'[]\n"x"\n{"kind":"other","instance":"9"}\n{"kind":"registration","insta')
    ledger.record_registration(tmp_path, "file", 2, root="/x")
    path.write_bytes(path.read_bytes() + b'{"kind":"registr\xff')
    assert [entry["instance"] for entry in ledger.registrations(tmp_path)] == ["1", "2"]


def test_nothing_recorded(tmp_path):
    assert ledger.registrations(tmp_path / "missing") == []
    assert ledger.read_segments(tmp_path / "missing") == []


def test_segments_are_replaced(tmp_path):
    ledger.write_segments(tmp_path, [("a", 1)])
    ledger.write_segments(tmp_path, {"psm_1": 7, "sem.mp-x": 8}.items())
    assert ledger.read_segments(tmp_path) == [("psm_1", 7), ("sem.mp-x", 8)]
    assert [path.name for path in tmp_path.iterdir()] == ["segments.json"]


def test_an_unreadable_record_of_segments_is_ignored(tmp_path):
    for content in ("", "{", "[1]", json.dumps([["a", "x"]])):
        (tmp_path / "segments.json").write_text(content)
        assert ledger.read_segments(tmp_path) == []


def test_the_frontend_comes_back_and_is_no_registration(tmp_path):
    assert ledger.frontend(tmp_path) is None
    ledger.record_frontend(tmp_path, Process(12, 345), 30.0)
    assert ledger.frontend(tmp_path) == (Process(12, 345), 30.0)
    assert ledger.registrations(tmp_path) == []
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"kind":"frontend","pid":"x","start":1,"seconds":1}\n')
    assert ledger.frontend(tmp_path) is None


#: Each record of a run directory: what may be in it, and who reads it.
RECORDS = {
    "ledger.jsonl": (
        '{"kind":"registration","backend":"file","instance":"4ec5c2a6e8130c29","root":"/"}\n',
        ledger.registrations,
    ),
    "segments.json": ('[["psm_1", 7]]', ledger.read_segments),
    "processes.json": ("[[1, 7]]", ledger.read_processes),
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    "forged", ["link", "hard link", "others may write", "fifo", "fifo with a writer", "socket", "device", "directory"]
)
def test_records_that_another_user_may_have_written_are_ignored(tmp_path, record, forged):
    path = tmp_path / "run" / record
    path.parent.mkdir()
    text, read = RECORDS[record]
    writer = None
    (tmp_path / "file").write_text(text)
    if forged == "link":
        path.symlink_to(tmp_path / "file")
    elif forged == "hard link":
        path.hardlink_to(tmp_path / "file")
    elif forged == "others may write":
        path.write_text(text)
        path.chmod(0o620)
    elif forged.startswith("fifo"):
        os.mkfifo(path)
        if "writer" in forged:
            writer = os.open(path, os.O_RDWR)
            os.write(writer, text.encode())
    elif forged == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif forged == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero: never ends
        except PermissionError:
            pytest.skip("cannot make one here")
    else:
        path.mkdir()
    assert read(path.parent) == []
    if writer is not None:
        os.close(writer)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[[1, Infinity]]", "[[1, NaN]]", '{"kind": Infinity}', '"', "[[1]]", "[3]", "null"]
)
def test_malformed_records_are_ignored(tmp_path, record, content):
    """Cleaning up must continue, or the directory stays for good."""
    path = tmp_path / record
    path.write_text(content)
    assert RECORDS[record][1](tmp_path) == []


def test_a_malformed_frontend_is_ignored(tmp_path):
    for pid, seconds in (("Infinity", "1"), ("1", "Infinity"), ("1", "NaN"), ("-1", "1"), ("1", "-1"), ("[]", "1")):
        line = f'{{"kind":"frontend","pid":{pid},"start":1,"seconds":{seconds}}}\n'
        (tmp_path / "ledger.jsonl").write_text(line)
        assert ledger.frontend(tmp_path) is None, line


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_without_end_is_not_read(tmp_path, record):
    path = tmp_path / record
    text, read = RECORDS[record]
    path.write_text(text + "\n")
    assert len(read(tmp_path)) == 1
    os.truncate(path, 1 << 40)
    assert read(tmp_path) == []


def test_a_fifo_in_the_place_of_a_record_blocks_no_writer(tmp_path):
    for name in ("ledger.jsonl", "segments.json~"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="No such device"):
        ledger.record_registration(tmp_path, "etcd", 1)
    with pytest.raises(OSError, match="No such device"):
        ledger.write_segments(tmp_path, [("a", 1)])


def test_of_another_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    ledger.write_segments(tmp_path, [("a", 1)])
    os.chown(tmp_path / "segments.json", 12345, 12345)
    assert ledger.read_segments(tmp_path) == []


def test_records_go_where_the_descriptor_leads(tmp_path):
    """Somebody has put a link in the place of the directory."""
    directory, victim = tmp_path / "dw", tmp_path / "victim"
    directory.mkdir()
    victim.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    directory.rename(tmp_path / "moved")
    directory.symlink_to(victim)
    ledger.write_segments(descriptor, [("a", 1)])
    assert ledger.read_segments(descriptor) == [("a", 1)]
    os.close(descriptor)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        ledger.write_segments(directory, [("b", 1)])
    assert os.listdir(victim) == []


def test_other_users_can_neither_read_nor_write_them(tmp_path):
    mask = os.umask(0)
    try:
        ledger.write_segments(tmp_path, [("a", 1)])
        ledger.record_frontend(tmp_path, Process(1, 1), 1.0)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
