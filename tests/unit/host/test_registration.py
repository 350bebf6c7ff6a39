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

from dynamo_worker.errors import DiscoveryLostError, ServerUnreachableError
from dynamo_worker.host.discovery import etcd_store as etcd_module
from dynamo_worker.host.discovery import file_store as file_module
from dynamo_worker.host.discovery import registration as module
from dynamo_worker.host.discovery.etcd_store import EtcdStore
from dynamo_worker.host.discovery.file_store import FileStore
from dynamo_worker.host.discovery.registration import Registration
from dynamo_worker.host.discovery.store import DiscoveryAwayError
from dynamo_worker.supervisor.etcd import Gateway, entries_lease

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
    keys = EtcdStore(Gateway([], 1.0), int(INSTANCE, 16), ttl=60, runtime_ttl=600)
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

    monkeypatch.setattr(file_module.os, "walk", fail)
    entries[1].unlink()
    (tmp_path / "v1/mdc/other").write_text("a change, so that it has to look")
    assert store.missing() == [str(entries[1])]


class FakeEtcd:
    """The gateway of an etcd: leases with their keys, and the lives of the leases."""

    RUNTIMES = "77"
    OURS = str(entries_lease(77))

    def __init__(self, monkeypatch):
        self.kvs = {"aQ==": "one", "bQ==": "two"}
        self.lease_of = dict.fromkeys(self.kvs, self.RUNTIMES)
        self.ttl = {self.RUNTIMES: 600}
        self.down = set()
        self.logins = 0
        self.token_ends = False
        self.unreadable = set()
        self.calls = []
        monkeypatch.setenv("ETCD_AUTH_USERNAME", "user")
        monkeypatch.setattr(Gateway, "post", self.post)

    def store(self, *endpoints, ttl=60):
        return EtcdStore(Gateway(endpoints or ["a"], 1.0), 77, ttl=ttl, runtime_ttl=600)

    def delete(self, *keys):
        for key in keys or list(self.kvs):
            del self.kvs[key], self.lease_of[key]

    def end(self, lease):
        del self.ttl[lease]
        self.delete(*(key for key, holder in list(self.lease_of.items()) if holder == lease))

    def put(self, key, value, lease):
        assert lease in self.ttl
        self.kvs[key], self.lease_of[key] = value, lease

    def post(self, endpoint, path, body, headers):
        self.calls.append(path)
        if endpoint in self.down:
            raise ConnectionRefusedError("connection refused")
        if path == "/v3/auth/authenticate":
            self.logins += 1
            return 200, {"token": str(self.logins)}
        assert headers["Authorization"] == str(self.logins)
        if self.token_ends:
            self.token_ends = False
            return 401, {"message": "etcdserver: invalid auth token"}
        if path == "/v3/lease/timetolive":
            keys = [key for key, lease in self.lease_of.items() if lease == body["ID"]]
            return 200, {"TTL": str(self.ttl.get(body["ID"], -1)), **({"keys": keys} if keys else {})}
        if path == "/v3/lease/grant":
            if body["ID"] in self.ttl:
                return 400, {"message": "etcdserver: lease already exists"}
            self.ttl[body["ID"]] = int(body["TTL"])
            return 200, body
        if path == "/v3/lease/keepalive":
            return 200, {"result": {"TTL": str(self.ttl[body["ID"]])} if body["ID"] in self.ttl else {}}
        if path == "/v3/lease/revoke":
            if body["ID"] not in self.ttl:
                return 404, {"message": "etcdserver: requested lease not found"}
            self.end(body["ID"])
            return 200, {}
        if path == "/v3/kv/range":
            if body["key"] in self.unreadable:
                return 200, {"message": "half an answer"}
            return 200, {"kvs": [{"key": body["key"], "value": self.kvs[body["key"]], "mod_revision": "5"}]}
        if path == "/v3/kv/txn":
            assert all(each["mod_revision"] == "5" for each in body.get("compare", ()))
            assert len(body["success"]) <= 128, "etcd takes no more"
            for each in body["success"]:
                self.put(*(each["request_put"][name] for name in ("key", "value", "lease")))
            return 200, {"succeeded": True}
        raise AssertionError(path)


@pytest.fixture
def etcd(monkeypatch):
    return FakeEtcd(monkeypatch)


def test_the_keys_are_moved_to_a_short_lease_and_that_one_is_kept_alive(etcd):
    store = etcd.store()
    store.adopt(())
    assert set(etcd.lease_of.values()) == {etcd.OURS}
    etcd.put("cQ==", "adapter", etcd.RUNTIMES)
    store._renewed -= 21  # a third of its life has passed
    etcd.calls.clear()
    assert store.missing() == []
    assert "/v3/lease/keepalive" in etcd.calls
    assert etcd.lease_of["cQ=="] == etcd.OURS
    assert store.count == 3


def test_keys_that_vanish_from_etcd_are_put_back_with_the_lease(etcd):
    store = etcd.store()
    store.adopt(())
    etcd.put("cQ==", "adapter", etcd.OURS)
    assert store.missing() == []
    before = dict(etcd.kvs)
    etcd.delete()
    missing = store.missing()
    assert sorted(missing) == sorted(before)
    store.restore(missing)
    assert etcd.kvs == before
    assert set(etcd.lease_of.values()) == {etcd.OURS}
    assert store.missing() == []
    etcd.delete("aQ==")
    store.adopt(())
    assert store.missing() == [], "the worker has taken it away"
    store.close()
    etcd.delete()
    store.restore(["bQ=="])
    assert not etcd.kvs


def test_an_etcd_that_has_lost_everything_gets_leases_and_keys_again(etcd):
    """The runtime shuts down if its lease does not come back."""
    store = etcd.store()
    store.adopt(())
    before = dict(etcd.kvs)
    etcd.down = {"a"}
    with pytest.raises(DiscoveryAwayError):
        store.missing()
    etcd.end(etcd.OURS)
    etcd.end(etcd.RUNTIMES)
    etcd.down = set()
    missing = store.missing()
    assert etcd.ttl == {etcd.RUNTIMES: 600}
    store.restore(missing)
    assert etcd.kvs == before
    assert etcd.ttl == {etcd.RUNTIMES: 600, etcd.OURS: 60}


def test_a_closed_store_grants_no_lease(etcd):
    store = etcd.store()
    store.adopt(())
    store.close()
    store.release()
    etcd.end(etcd.RUNTIMES)
    store.missing()
    store.restore(["aQ=="])
    store.release()
    assert etcd.ttl == {}
    assert etcd.kvs == {}


def test_what_cannot_be_read_from_etcd_is_not_put_back_empty(etcd):
    store = etcd.store()
    store.adopt(())
    etcd.unreadable = {"aQ=="}
    with pytest.raises(OSError, match="cannot be read"):
        store.adopt(())
    etcd.unreadable = set()
    store.adopt(())
    etcd.put("cQ==", "adapter", etcd.OURS)
    etcd.unreadable = {"cQ=="}
    assert store.missing() == []
    etcd.delete("cQ==")
    assert store.missing() == []


def test_an_etcd_that_does_not_answer_says_nothing_about_the_keys(etcd):
    store = etcd.store("a", "b")
    etcd.down = {"a"}
    store.adopt(())
    interval = store.interval
    etcd.down = {"a", "b"}
    with pytest.raises(DiscoveryAwayError, match="a: connection refused"):
        store.missing()
    assert store.interval < interval, "it is asked more often"
    etcd.down = set()
    assert store.missing() == []
    assert store.interval == interval


def test_a_deaf_etcd_is_asked_without_a_pause(etcd, monkeypatch):
    """Whoever asks when it goes on is back in milliseconds."""
    store = etcd.store()
    store.adopt(())
    now = time.monotonic()

    def wait(*_):
        nonlocal now
        now += 2.0
        raise TimeoutError("it accepted, and did not answer within 2 s")

    with monkeypatch.context() as deaf:
        deaf.setattr(etcd_module.time, "monotonic", lambda: now)
        deaf.setattr(Gateway, "post", wait)
        with pytest.raises(DiscoveryAwayError):
            store.missing()
        assert store.interval == 0
    etcd.down = {"a"}
    with pytest.raises(DiscoveryAwayError):
        store.missing()
    assert store.interval == 1, "one that refuses connections is not asked in a busy loop"


def test_many_keys_are_put_back_with_few_requests(etcd):
    etcd.kvs = {base64.b64encode(b"v1/%d" % number).decode(): "value" for number in range(150)}
    etcd.lease_of = dict.fromkeys(etcd.kvs, etcd.RUNTIMES)
    store = etcd.store()
    store.adopt(())
    before = dict(etcd.kvs)
    etcd.delete()
    etcd.calls.clear()
    store.restore(list(before))
    assert etcd.kvs == before
    assert etcd.calls.count("/v3/kv/txn") == 5


def test_a_token_that_has_ended_is_renewed(etcd):
    store = etcd.store()
    store.adopt(())
    store.missing()
    assert etcd.logins == 1
    etcd.token_ends = True
    etcd.delete("aQ==")
    assert store.missing() == ["aQ=="]
    assert etcd.logins == 2


class AwayStore(HungStore):
    """A discovery server that may be away, and one entry that may be missing."""

    def __init__(self):
        super().__init__()
        self.away = False
        self.there = True

    def missing(self):
        if self.away:
            raise DiscoveryAwayError("nobody listens")
        return [] if self.there else ["entry"]

    def restore(self, names):
        assert names == ["entry"]
        self.there = True


def test_an_outage_is_no_problem_of_the_worker_and_what_it_cost_is_restored_at_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "_CONFIRM", 60.0)
    store = AwayStore()

    async def main():
        async with watching(store) as (registration, fatal):
            store.away = True
            await until(lambda: "Discovery does not answer; the worker keeps serving" in caplog.text)
            assert registration.problem is None
            store.there = False
            store.away = False
            await until(lambda: "Discovery answers again" in caplog.text)
            assert store.there
            assert registration.problem is None
            assert not fatal
        assert caplog.text.count("keeps serving") == 1

    asyncio.run(main())


def test_an_outage_that_lasts_too_long_ends_the_worker():
    store = AwayStore()

    async def main():
        fatal = []
        registration = Registration(store, fatal.append, timeout=30.0, outage=0.1)
        store.away = True
        started = time.monotonic()
        await asyncio.wait_for(registration.run(), 5)
        assert time.monotonic() - started >= 0.1
        (error,) = fatal
        assert isinstance(error, ServerUnreachableError)
        assert str(error).startswith("discovery has not answered for 0.1 s: nobody listens")
        await registration.close()

    asyncio.run(main())
