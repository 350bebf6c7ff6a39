"""The entries in a pod's custom resource: what is missed and put back, and when the API is left alone."""

from __future__ import annotations

import copy
import json

import pytest

from dynamo_worker.host.discovery import kubernetes_store as module
from dynamo_worker.host.discovery.kubernetes_store import KubernetesStore
from dynamo_worker.host.discovery.store import DiscoveryAwayError
from dynamo_worker.supervisor.kubernetes import KubernetesError

ENDPOINT, OTHER = "a/b/generate/77", "a/b/clear/77"
EVERYTHING = {
    "endpoints": {ENDPOINT: {"port": 1}, OTHER: {"port": 2}},
    "model_cards": {ENDPOINT: {"card_json": {"display_name": "m"}}},
    "event_channels": {"a/b/kv-events/5": {"port": 3}},
    "event_sources": {},
}
NOTHING = {group: {} for group in EVERYTHING}


class FakeApi:
    """One resource, and what the API does instead of answering."""

    def __init__(self, monkeypatch):
        self.data = copy.deepcopy(EVERYTHING)
        self.owner = [{"uid": "1111"}]
        self.version = 1
        self.error = None
        self.calls = 0
        self.now = 1000.0
        self.others = []
        monkeypatch.setattr(module.kubernetes, "read", self.read)
        monkeypatch.setattr(module.kubernetes, "apply", self.apply)
        monkeypatch.setattr(module.kubernetes, "sample", lambda count, deadline: self.others[:count])
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def trouble(self):
        self.calls += 1
        if self.error is not None:
            raise self.error

    def read(self, deadline):
        self.trouble()
        if self.data is None:
            return None
        metadata = {"ownerReferences": self.owner, "resourceVersion": str(self.version)}
        return {"metadata": metadata, "spec": {"data": copy.deepcopy(self.data)}}

    def apply(self, metadata, data, deadline):
        self.trouble()
        assert metadata["ownerReferences"] == [{"uid": "1111"}], "Kubernetes removes it with its pod"
        assert metadata.get("resourceVersion") == (None if self.data is None else str(self.version))
        self.version += 1
        self.data = copy.deepcopy(data)


@pytest.fixture
def api(monkeypatch):
    return FakeApi(monkeypatch)


@pytest.fixture
def store(api):
    store = KubernetesStore()
    store.adopt(())
    assert store.count == 3
    return store


NECESSARY = [f"endpoints/{ENDPOINT}", f"endpoints/{OTHER}", f"model_cards/{ENDPOINT}"]


@pytest.mark.parametrize("left", [None, NOTHING, {}, {"endpoints": []}, []])
def test_a_resource_that_is_deleted_or_emptied_is_put_back_whole(api, store, left):
    api.data = left
    assert store.missing() == NECESSARY
    store.restore(store.missing())
    assert api.data == EVERYTHING
    assert store.missing() == []


def test_a_single_entry_is_put_back_beside_what_is_new(api, store):
    del api.data["model_cards"][ENDPOINT]
    api.data["endpoints"]["a/b/new/77"] = {"port": 4}
    assert store.missing() == [f"model_cards/{ENDPOINT}"]
    store.restore([f"model_cards/{ENDPOINT}"])
    assert api.data["model_cards"] == EVERYTHING["model_cards"]
    assert api.data["endpoints"]["a/b/new/77"] == {"port": 4}
    assert store.missing() == []
    assert store.count == 4, "it is expected from now on"


def test_what_the_worker_has_taken_away_stays_away(api, store):
    del api.data["endpoints"][ENDPOINT], api.data["endpoints"][OTHER]
    assert store.missing() == NECESSARY[:2]
    store.adopt([f"endpoints/{OTHER}"])  # that one has vanished by itself
    assert store.missing() == [f"endpoints/{OTHER}"]
    store.restore([f"endpoints/{OTHER}"])
    assert api.data["endpoints"] == {OTHER: {"port": 2}}


def test_an_announcement_of_events_may_go(api, store):
    api.data["event_channels"] = {}
    assert store.missing() == []
    api.data = None
    store.restore(store.missing())
    assert api.data == {**EVERYTHING, "event_channels": {}}


def test_nothing_is_written_over_another_pod_of_the_same_name(api, store):
    api.owner = [{"uid": "2222"}]
    api.data = copy.deepcopy(NOTHING)
    for _ in range(2):
        with pytest.raises(OSError, match="belongs to another pod") as raised:
            store.missing()
        assert not isinstance(raised.value, DiscoveryAwayError), "it does not end by itself"


def test_a_closed_store_writes_nothing(api, store):
    api.data = None
    missing = store.missing()
    store.close()
    store.restore(missing)
    assert api.data is None


def test_the_endpoints_of_entries(store):
    assert [store.endpoint(name) for name in NECESSARY] == ["a/b/generate", "a/b/clear", None]


@pytest.mark.parametrize(
    "error",
    [
        *(KubernetesError("no", status) for status in (401, 403, 404, 429, 500, 503)),
        ConnectionRefusedError("refused"),
        TimeoutError("it accepted, and did not answer within 5 s"),
        FileNotFoundError("no token"),
    ],
    ids=str,
)
def test_an_api_in_trouble_says_nothing_about_the_entries_and_is_left_alone(api, store, error):
    api.error, api.calls = error, 0
    waited = []
    for _ in range(10):
        with pytest.raises(DiscoveryAwayError, match=str(error)):
            store.missing()
        calls = api.calls
        for ask in (store.missing, lambda: store.restore(NECESSARY), lambda: store.adopt(()), store.cards):
            with pytest.raises(DiscoveryAwayError, match=str(error)):
                ask()
        assert api.calls == calls, "nothing asks meanwhile, whatever the reason"
        waited.append(store.interval)
        api.now += store.interval + 0.001
    assert 1.5 <= waited[0] <= 2.5
    assert all(45 <= seconds <= 75 for seconds in waited[-4:])
    api.error = None
    assert store.missing() == []
    assert store.interval < 20


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_what_the_api_rejects_is_a_failure_and_no_outage(api, store, status):
    api.data = None
    missing = store.missing()
    api.error = KubernetesError("no", status)
    with pytest.raises(KubernetesError):
        store.restore(missing)
    api.error = None
    store.restore(missing)
    assert api.data == EVERYTHING


def test_a_fleet_asks_rarely_and_not_at_once(api, store):
    for _ in range(6):
        store.missing()
    times = [store.interval for _ in range(200)]
    assert min(times) >= 22.5
    assert max(times) <= 37.5
    assert max(times) - min(times) > 10
    api.data = None
    store.missing()
    assert store.interval <= 2.5, "more closely after a loss"


def test_cards_of_other_workers_of_the_same_endpoint(api, store):
    card = {"card_json": {"display_name": "m", "context_length": 5}}
    api.others = [
        {"spec": {"data": EVERYTHING}},
        {"spec": {"data": {"model_cards": {"a/b/generate/88": card, "a/else/generate/99": card}}}},
        "no resource",
        {"spec": None},
    ]
    own, others = store.cards()
    assert [json.loads(each) for each in own] == [EVERYTHING["model_cards"][ENDPOINT]]
    assert [json.loads(each) for each in others] == [card]
