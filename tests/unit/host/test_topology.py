"""Where a worker is: what the deployment writes, late or not at all."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from dynamo_worker.errors import StartError
from dynamo_worker.host.discovery import topology

ON = {"DYN_TOPOLOGY_ENABLED": "true", "DYN_KV_TRANSFER_DOMAIN": "zone"}


def read(directory: Path, patience: float = 0.0, **changes: str) -> dict[str, object]:
    environ = {**ON, "DYN_TOPOLOGY_MOUNT_PATH": str(directory), **changes}
    return asyncio.run(topology.read(environ, patience=patience))


@pytest.mark.parametrize("value", ["", "false", "0", "off", "No", "maybe"])
def test_it_is_off_unless_it_is_asked_for(value: str, tmp_path: Path) -> None:
    """NVIDIA's workers serve without topology if the value is none they know."""
    assert read(tmp_path, DYN_TOPOLOGY_ENABLED=value) == {}


@pytest.mark.parametrize("value", ["true", "1", " On ", "YES"])
def test_every_file_is_a_kind_of_place(value: str, tmp_path: Path) -> None:
    for name, content in {"zone": "zone-a\n", "rack": "r7", "empty": " \n", ".hidden": "x", "bytes": "x"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")  # reading it would never end
    assert read(tmp_path, DYN_TOPOLOGY_ENABLED=value) == {
        "topology_domains": {"rack": "r7", "zone": "zone-a"},
        "kv_transfer_domain": "zone",
        "kv_transfer_enforcement": "required",
        "kv_transfer_preferred_weight": None,
    }


def test_how_transfers_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "zone").write_text("a")
    found = read(tmp_path, DYN_KV_TRANSFER_ENFORCEMENT="preferred", DYN_KV_TRANSFER_PREFERRED_WEIGHT="0.85")
    assert (found["kv_transfer_enforcement"], found["kv_transfer_preferred_weight"]) == ("preferred", 0.85)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DYN_KV_TRANSFER_DOMAIN": " "}, "DYN_KV_TRANSFER_DOMAIN is not"),
        ({"DYN_KV_TRANSFER_ENFORCEMENT": "hoped"}, "expected one of required, preferred, got 'hoped'"),
        ({"DYN_KV_TRANSFER_PREFERRED_WEIGHT": "much"}, "expected a number, got 'much'"),
        ({"DYN_KV_TRANSFER_PREFERRED_WEIGHT": "nan"}, "expected a number, got 'nan'"),
        ({"DYN_KV_TRANSFER_DOMAIN": "hall"}, "hall does not exist or is empty after 0 s"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "zone").write_text("a")
    with pytest.raises(StartError, match=message):
        read(tmp_path, **changes)


def test_a_file_may_appear_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "_PAUSE", 0.02)
    timer = threading.Timer(0.2, (tmp_path / "zone").write_text, ["a"])
    timer.start()
    assert read(tmp_path, patience=20.0)["topology_domains"] == {"zone": "a"}
    timer.join()


def test_files_without_end_are_read_to_a_bound(tmp_path: Path) -> None:
    with open(tmp_path / "zone", "wb") as file:
        file.write(b"z" * (1 << 20))
    begun = time.monotonic()
    assert len(str(read(tmp_path)["topology_domains"])) < 2000
    assert time.monotonic() - begun < 5
