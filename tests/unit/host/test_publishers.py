"""Which announcements of event publishers are this process's own: those of the ports that it listens on."""

from __future__ import annotations

import json
import os
import socket

import pytest

from dynamo_worker.host.discovery import publishers as module
from dynamo_worker.host.discovery.file_store import FileStore
from dynamo_worker.host.discovery.publishers import CHANNELS, OwnPublishers

INSTANCE = "4b13168d7bd741fa"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def announce(root, publisher, endpoint):
    path = root / CHANNELS / f"namespace%2Fd%2Ftopic%2Fkv%2Devents%2F{publisher}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "EventChannel", "transport": {"config": {"endpoint": endpoint}}}))
    return path


def test_only_our_own_are_recorded_and_late_ones_too(tmp_path, listener):
    recorded = []
    announce(tmp_path, "1111aaaa", f"tcp://127.0.0.1:{listener}")
    announce(tmp_path, "2222bbbb", f"tcp://192.0.2.1:{listener}")  # the same port in another container
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # not listening
        announce(tmp_path, "3333cccc", f"tcp://127.0.0.1:{other.getsockname()[1]}")
        store = FileStore(str(tmp_path), INSTANCE, OwnPublishers(recorded.append))
        store.adopt(())
    assert recorded == [["1111aaaa"]]
    assert store.count == 0
    announce(tmp_path, "4444dddd", f"tcp://127.0.0.1:{listener}")
    for _ in range(3):
        assert store.missing() == []
    assert recorded == [["1111aaaa"], ["1111aaaa", "4444dddd"]]
    announce(tmp_path, "1111aaaa", "").unlink()
    assert store.missing() == [], "it is not restored"


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "{}", '{"transport": 5}', '{"transport": {"config": {"endpoint": 5}}}']
)
def test_what_is_no_announcement(tmp_path, listener, text):
    recorded = []
    announce(tmp_path, "1111aaaa", "").write_text(text)
    for endpoint in ("tcp://127.0.0.1:x", "tcp://127.0.0.1", "ipc:///tmp/file", "tcp://[::", "tcp://host:99999999"):
        announce(tmp_path, f"2222{len(endpoint)}", endpoint)
    os.mkfifo(tmp_path / CHANNELS / "pipe")
    (tmp_path / CHANNELS / "link").symlink_to("/dev/zero")
    announce(tmp_path, "3333cccc", f"tcp://127.0.0.1:{listener}")
    FileStore(str(tmp_path), INSTANCE, OwnPublishers(recorded.append)).adopt(())
    assert recorded == [["3333cccc"]]


def test_a_record_that_fails_costs_nothing_but_the_record(tmp_path, listener):
    recorded = []
    full = True

    def record(ids):
        if full:
            raise OSError(28, "No space left on device")
        recorded.append(ids)

    path = tmp_path / f"v1/instances/a%2Fb%2Fc%2F{INSTANCE}"
    path.parent.mkdir(parents=True)
    path.touch()
    announce(tmp_path, "1111aaaa", f"tcp://127.0.0.1:{listener}")
    store = FileStore(str(tmp_path), INSTANCE, OwnPublishers(record))
    store.adopt(())
    assert store.count == 1
    full = False
    for _ in range(3):
        store.missing()
    assert recorded == [["1111aaaa"]]


def test_the_number_of_records_has_a_bound(tmp_path, listener, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PUBLISHERS", 3)
    recorded = []
    own = OwnPublishers(recorded.append)
    for number in range(6):
        path = announce(tmp_path, f"1111aaa{number}", f"tcp://127.0.0.1:{listener}")
        own.look(str(path.parent), os.listdir(path.parent))
    assert [len(each) for each in recorded] == [1, 2, 3]
