from __future__ import annotations

import json

from dynamo_worker.supervisor import ledger
from dynamo_worker.supervisor.linux import Process


def test_registrations_come_back(tmp_path):
    ledger.record_registration(tmp_path, "file", 0x4EC5C2A6E8130C29, root=tmp_path / "kv")
    ledger.record_registration(tmp_path, "etcd", 5676156927484300329, endpoints=["http://127.0.0.1:2379"])
    assert ledger.registrations(tmp_path) == [
        {"kind": "registration", "backend": "file", "instance": "4ec5c2a6e8130c29", "root": str(tmp_path / "kv")},
        {
            "kind": "registration",
            "backend": "etcd",
            "instance": "4ec5c2a6e8130c29",
            "endpoints": ["http://127.0.0.1:2379"],
        },
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


def test_an_illegible_record_of_segments_is_none(tmp_path):
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
