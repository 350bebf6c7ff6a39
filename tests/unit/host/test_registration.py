"""A worker that falls out of discovery comes back, and one that leaves stays out."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import socket
import threading
import time

import pytest
from aio import until

from dynamo_worker.errors import DiscoveryLostError
from dynamo_worker.host.discovery import registration as module
from dynamo_worker.host.discovery.registration import EtcdStore, FileStore, Registration

INSTANCE = "4b13168d7bd741fa"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(FileStore, "interval", 0.01)
    monkeypatch.setattr(module, "_CONFIRM", 0.05)


@pytest.fixture
def entries(tmp_path):
    """The files of one worker, and one of another's."""
    paths = [tmp_path / f"v1/instances/a%2Fb%2Fc%2F{INSTANCE}", tmp_path / f"v1/mdc/a%2Fb%2Fc%2F{INSTANCE}"]
    for path in [*paths, tmp_path / "v1/instances/a%2Fb%2Fc%2F1111111111111111"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {path.name}")
    return paths


@contextlib.asynccontextmanager
async def watching(store, timeout=30.0):
    fatal = []
    registration = Registration(store, fatal.append, timeout=timeout)
    task = asyncio.ensure_future(registration.run())
    try:
        await until(lambda: registration._call is not None and registration._call.done())
        yield registration, fatal
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await registration.close()


def test_what_vanishes_is_put_back_and_said_meanwhile(tmp_path, entries, caplog):
    before = [path.read_text() for path in entries]

    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, fatal):
            for path in entries:
                path.unlink()
            await until(lambda: registration.problem)
            assert not any(path.exists() for path in entries), "not at once: the supervisor may have withdrawn it"
            await until(lambda: registration.problem is None)
            assert [path.read_text() for path in entries] == before
            assert not fatal

    asyncio.run(main())
    assert [record.args[0] for record in caplog.records if record.name == module.__name__] == [
        "Out of discovery; registering again",
        "In discovery again",
    ]
    assert len(list(tmp_path.rglob("*"))) == 3 + 3, "nothing else is left there"


@pytest.mark.parametrize("planted", ["fifo", "link", "socket", "directory", "without end"])
def test_what_is_no_entry_is_not_learned(tmp_path, entries, planted):
    """With our id in its name it would be put back for routers to read; a FIFO would keep us from looking at all."""
    path, secret = tmp_path / "v1/instances" / f"x%2F{INSTANCE}", tmp_path / "secret"
    secret.write_text("secret")
    if planted == "fifo":
        os.mkfifo(path)
    elif planted == "link":
        path.symlink_to(secret)
    elif planted == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif planted == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    store = FileStore(str(tmp_path), INSTANCE)
    assert store.missing() == []
    assert store.count == len(entries)


@pytest.mark.parametrize("planted", ["fifo", "link"])
def test_an_entry_is_put_back_through_nothing_that_lies_in_the_way(tmp_path, entries, planted):
    draft, victim = tmp_path / f".tmp_{INSTANCE}", tmp_path / "victim"
    victim.write_text("precious")
    store = FileStore(str(tmp_path), INSTANCE)
    store.missing()
    entries[0].unlink()
    if planted == "fifo":
        os.mkfifo(draft)
    else:
        draft.symlink_to(victim)
    store.restore(store.missing())
    assert entries[0].read_text() == f"content of {entries[0].name}"
    assert not entries[0].is_symlink()
    assert victim.read_text() == "precious"


def test_a_directory_that_vanishes_is_made_again(tmp_path, entries):
    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)):
            shutil.rmtree(tmp_path / "v1")
            await until(lambda: all(path.exists() for path in entries))

    asyncio.run(main())


def test_what_is_added_later_is_watched_too(tmp_path, entries):
    adapter = entries[1].with_name(f"{entries[1].name}%2Fadapter")

    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):
            adapter.write_text("card")
            await until(lambda: str(adapter) in registration._store._files)
            adapter.unlink()
            await until(adapter.exists)
            assert adapter.read_text() == "card"

    asyncio.run(main())


def test_what_appears_late_is_waited_for_and_put_back_from_its_first_moment(tmp_path, entries):
    """The runtime registers endpoints some time after it was asked to."""
    late = entries[0].with_name(f"late%2F{INSTANCE}")

    async def main():
        registration = Registration(FileStore(str(tmp_path), INSTANCE), lambda _: None, timeout=30.0)
        entered = asyncio.ensure_future(registration.entered(3))
        await asyncio.sleep(0.1)
        assert not entered.done()
        late.write_text("late")
        assert await entered
        late.unlink()
        task = asyncio.ensure_future(registration.run())
        await until(late.exists)
        task.cancel()
        await registration.close()

    asyncio.run(main())


def test_what_never_appears_is_waited_for_some_seconds(tmp_path, entries, monkeypatch):
    monkeypatch.setattr(module, "_ENTER", 0.1)

    async def main():
        registration = Registration(FileStore(str(tmp_path), INSTANCE), lambda _: None, timeout=30.0)
        assert not await registration.entered(3)
        await registration.close()

    asyncio.run(main())


def test_what_the_worker_adds_is_put_back_from_its_first_moment(tmp_path, entries, monkeypatch):
    monkeypatch.setattr(FileStore, "_learn_new", lambda _: None)  # as if no look came between
    adapter = entries[1].with_name(f"{entries[1].name}%2Fadapter")

    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):
            async with registration.changing():
                adapter.write_text("card")
            adapter.unlink()
            await until(adapter.exists)

    asyncio.run(main())


def test_what_the_worker_takes_away_stays_away(tmp_path, entries):
    instance, card = entries

    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):
            async with registration.changing():
                instance.unlink()
            card.unlink()
            await until(card.exists)
            assert not instance.exists()
            instance.write_text("is back")
            await until(lambda: str(instance) in registration._store._files)
            instance.unlink()
            await until(instance.exists)
            assert instance.read_text() == "is back"

    asyncio.run(main())


def test_what_the_worker_takes_away_stays_away_when_the_look_at_it_fails(tmp_path, entries, monkeypatch):
    instance, card = entries
    adopt = FileStore.adopt
    failed = []

    def fails_once(store, lost):
        if not instance.exists() and not failed:
            failed.append(True)
            raise OSError(24, "Too many open files")
        adopt(store, lost)

    monkeypatch.setattr(FileStore, "adopt", fails_once)

    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):
            async with registration.changing():
                instance.unlink()
            assert failed
            await until(lambda: registration._unadopted is None)
            card.unlink()
            await until(card.exists)
            await asyncio.sleep(0.2)
            assert not instance.exists()
            assert registration.problem is None

    asyncio.run(main())


def test_no_thread_to_look_with_is_a_failed_look(tmp_path, entries, monkeypatch):
    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):

            def refuse(*_):
                raise RuntimeError("can't start new thread")

            loop = asyncio.get_running_loop()
            with monkeypatch.context() as patch:
                patch.setattr(loop, "run_in_executor", refuse)
                await until(lambda: registration.problem == "can't start new thread")
            await until(lambda: registration.problem is None)

    asyncio.run(main())


def test_what_was_lost_before_the_worker_leaves_is_still_lost(tmp_path, entries):
    instance, card = entries
    store = FileStore(str(tmp_path), INSTANCE)
    store.adopt(())
    registration = Registration(store, lambda error: None, timeout=30)

    async def main():
        card.unlink()
        async with registration.changing():
            instance.unlink()
        assert store.missing() == [str(card)]
        await registration.close()

    asyncio.run(main())


def test_an_entry_that_was_lost_before_the_worker_leaves_on_purpose_is_not_put_back(tmp_path, entries):
    card = entries[1]
    store = FileStore(str(tmp_path), INSTANCE)
    store.adopt(())
    registration = Registration(store, lambda error: None, timeout=30)

    async def main():
        for path in entries:
            path.unlink()
        registration.withdrawn = {"a/b/c"}
        async with registration.changing() as lost:
            assert lost == {"a/b/c"}
        assert store.missing() == [str(card)]
        await registration.close()

    asyncio.run(main())


def test_the_endpoint_of_an_entry(tmp_path):
    files = FileStore(str(tmp_path), INSTANCE)
    assert files.endpoint(f"{tmp_path}/v1/instances/a%2Fb%2Fc%2F{INSTANCE}") == "a/b/c"
    assert files.endpoint(f"{tmp_path}/v1/mdc/a%2Fb%2Fc%2F{INSTANCE}") is None
    keys = EtcdStore([], int(INSTANCE, 16))
    assert keys.endpoint(base64.b64encode(f"v1/instances/a/b/c/{INSTANCE}".encode()).decode()) == "a/b/c"
    assert keys.endpoint(base64.b64encode(f"v1/mdc/a/b/c/{INSTANCE}".encode()).decode()) is None


def test_a_closed_registration_puts_nothing_back(tmp_path, entries):
    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE)) as (registration, _):
            await registration.close()
            entries[0].unlink()
            await asyncio.sleep(0.2)
            async with registration.changing():
                pass
        assert not entries[0].exists()

    asyncio.run(main())
    store = FileStore(str(tmp_path), INSTANCE)
    store.adopt(())
    store.close()  # while a call of it hangs
    entries[1].unlink()
    store.restore([str(entries[1])])
    assert not entries[1].exists()


def test_a_worker_that_cannot_come_back_ends(tmp_path, entries):
    async def main():
        async with watching(FileStore(str(tmp_path), INSTANCE), timeout=0.3) as (registration, fatal):
            shutil.rmtree(tmp_path / "v1")
            (tmp_path / "v1").write_text("in the way")
            await until(lambda: fatal)
            assert isinstance(fatal[0], DiscoveryLostError)
            assert "could not register again within 0.3 s" in str(fatal[0])
            assert str(tmp_path) in str(fatal[0]), "it says what is in the way"
            assert registration.problem

    asyncio.run(main())


class HungStore:
    """A network file system whose server is gone."""

    interval = 0.01

    def __init__(self):
        self.go_on = threading.Event()
        self.hangs = False
        self.calls = 0

    def adopt(self, lost):
        pass

    def missing(self):
        self.calls += 1
        if self.hangs:
            self.go_on.wait(30)
        return []

    def close(self):
        pass


def test_a_discovery_that_hangs_holds_up_neither_the_loop_nor_the_end(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    monkeypatch.setattr(module, "_CLOSE", 0.01)
    store = HungStore()

    async def main():
        async with watching(store, timeout=0.3) as (registration, fatal):
            store.hangs = True
            await until(lambda: registration.problem == "discovery has not answered for 0.1 s")
            calls = store.calls
            await until(lambda: fatal)
            assert store.calls == calls, "one thread hangs, not one more each second"
        store.go_on.set()

    asyncio.run(main())


def test_a_discovery_that_answers_again_is_no_problem_any_more(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    store = HungStore()

    async def main():
        async with watching(store) as (registration, fatal):
            store.hangs = True
            await until(lambda: registration.problem)
            store.hangs = False
            store.go_on.set()
            await until(lambda: registration.problem is None)
            assert not fatal

    asyncio.run(main())


def test_a_file_that_the_runtime_does_not_refresh_is_refreshed(tmp_path, entries):
    """Short of descriptors it cannot, and after 10 s any other worker removes the file."""
    store = FileStore(str(tmp_path), INSTANCE)
    store.adopt(())
    young, old = time.time() - 3, time.time() - 9
    os.utime(entries[0], (young, young))
    os.utime(entries[1], (old, old))
    assert store.missing() == []
    assert entries[0].stat().st_mtime == pytest.approx(young), "the runtime does that itself"
    assert time.time() - entries[1].stat().st_mtime < 3


def test_without_a_descriptor_nothing_is_taken_for_lost(tmp_path, entries, monkeypatch):
    store = FileStore(str(tmp_path), INSTANCE)
    store.adopt(())

    def fail(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(module.os, "walk", fail)
    entries[1].unlink()
    (tmp_path / "v1/mdc/other").write_text("a change, so that it has to look")
    assert store.missing() == [str(entries[1])]


class FakeEtcd:
    """The gateway of an etcd with one lease."""

    def __init__(self, monkeypatch):
        self.kvs = {"aQ==": "one", "bQ==": "two"}
        self.ttl = 30
        self.down = set()
        self.logins = 0
        self.token_ends = False
        self.unreadable = set()
        monkeypatch.setattr(module, "post", self.post)
        monkeypatch.setattr(module, "etcd_headers", self.login)

    def login(self, endpoint, timeout):
        self.logins += 1
        return {"Authorization": str(self.logins)}

    def post(self, endpoint, path, body, headers, timeout):
        if endpoint in self.down:
            raise ConnectionRefusedError("connection refused")
        if self.token_ends:
            self.token_ends = False
            return 401, {"message": "invalid auth token"}
        if path == "/v3/lease/timetolive":
            assert body == {"ID": "77", "keys": True}
            return 200, {"TTL": str(self.ttl), **({"keys": list(self.kvs)} if self.kvs else {})}
        if path == "/v3/kv/range":
            if body["key"] in self.unreadable:
                return 200, {"message": "half an answer"}
            return 200, {"kvs": [{"key": body["key"], "value": self.kvs[body["key"]]}]}
        assert path == "/v3/kv/put"
        assert body["lease"] == "77"
        self.kvs[body["key"]] = body["value"]
        return 200, {}


@pytest.fixture
def etcd(monkeypatch):
    return FakeEtcd(monkeypatch)


def test_keys_that_vanish_from_etcd_are_put_back_with_the_lease(etcd):
    store = EtcdStore(["a"], 77)
    store.adopt(())
    etcd.kvs["cQ=="] = "adapter"
    assert store.missing() == []
    before = dict(etcd.kvs)
    etcd.kvs.clear()
    missing = store.missing()
    assert sorted(missing) == sorted(before)
    store.restore(missing)
    assert etcd.kvs == before
    assert store.missing() == []
    del etcd.kvs["aQ=="]
    store.adopt(())
    assert store.missing() == [], "the worker has taken it away"
    store.close()
    etcd.kvs.clear()
    store.restore(["bQ=="])
    assert not etcd.kvs


def test_what_cannot_be_read_from_etcd_is_not_put_back_empty(etcd):
    store = EtcdStore(["a"], 77)
    etcd.unreadable = {"aQ=="}
    with pytest.raises(OSError, match="cannot be read"):
        store.adopt(())
    etcd.unreadable = set()
    store.adopt(())
    etcd.kvs["cQ=="] = "adapter"
    etcd.unreadable = {"cQ=="}
    assert store.missing() == []
    del etcd.kvs["cQ=="]
    assert store.missing() == []


def test_an_etcd_that_does_not_answer_or_a_lease_that_has_ended_is_the_runtimes_business(etcd):
    store = EtcdStore(["a", "b"], 77)
    etcd.down = {"a"}
    store.adopt(())
    etcd.down = {"a", "b"}
    assert store.missing() == []
    etcd.down = set()
    etcd.kvs.clear()
    etcd.ttl = -1
    assert store.missing() == []


def test_a_token_that_has_ended_is_renewed(etcd):
    store = EtcdStore(["a"], 77)
    store.adopt(())
    store.missing()
    assert etcd.logins == 1
    etcd.token_ends = True
    del etcd.kvs["aQ=="]
    assert store.missing() == []
    assert store.missing() == ["aQ=="]
    assert etcd.logins == 2
