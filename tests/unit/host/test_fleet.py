"""The workers in discovery: what their entries say, from every backend, whatever else is there."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from dynamo_worker.address import Address
from dynamo_worker.engine import EngineInfo
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.settings import WorkerSettings
from dynamo_worker.host.discovery import fleet_reader, model_card
from dynamo_worker.host.discovery.fleet import STATUS_ADDRESS, Entry, workers
from dynamo_worker.host.discovery.fleet_reader import FleetReader
from dynamo_worker.host.discovery.runtime import _published
from dynamo_worker.supervisor import kubernetes
from dynamo_worker.supervisor.etcd import Gateway

NAME = "prod/backend/generate/77"
INSTANCE = {"type": "Endpoint", "transport": {"tcp": "10.0.0.7:33095/77/prod/backend/generate"}}


def card(status=None, files=None, model="llama"):
    data = {} if status is None else {STATUS_ADDRESS: status}
    return {"card_json": {"display_name": model, "runtime_config": {"runtime_data": data}, **(files or {})}}


FILES = {"model_info": {"hf_config_json": {"path": "http://10.0.0.9:40465/v1/metadata/x/config.json"}}}


@pytest.mark.parametrize(
    ("status", "files", "expected"),
    [
        ("10.0.0.1:9090", None, "10.0.0.1:9090"),
        ("[fd00::1]:9090", None, "[fd00::1]:9090"),
        (":9090", None, "10.0.0.7:9090"),  # on the host of its requests
        ("0.0.0.0:9090", None, "10.0.0.7:9090"),
        (":9090", FILES, "10.0.0.7:9090"),
        (None, FILES, "10.0.0.9:40465"),  # the runtime's own server, from which frontends read files
        (None, None, None),
        ("name:9090", None, None),  # a name server that hangs would delay everything
        *((wrong, None, None) for wrong in ("", "x", ":0", ":99999", "10.0.0.1:", 7, ["10.0.0.1:1"], "1" * 10_000)),
        (None, {"model_info": {"a": {"path": "http://[::1"}}, "x": 3}, None),
        (None, {"model_info": {"a": {"path": "http://10.0.0.9:99999999/"}}}, None),
    ],
)
def test_the_status_address(status, files, expected):
    found = workers([Entry(False, NAME, INSTANCE), Entry(True, NAME, card(status, files))])
    status_address = found["77"].status
    assert (None if status_address is None else str(status_address)) == expected


def test_a_drained_worker_has_its_cards_only():
    found = workers([Entry(True, NAME, card(":9090", FILES)), Entry(True, f"{NAME}/adapter", card(model="adapter"))])
    worker = found["77"]
    assert (worker.namespace, worker.component, worker.endpoints) == ("prod", "backend", [])
    assert worker.models == ["llama", "adapter"]
    assert worker.status == Address("10.0.0.9", 9090)


@pytest.mark.parametrize("name", ["", "a/b/c", "a/b/c/xyz", "a//c/77", f"{'a' * 300}/b/c/77", f"a/b/c/{'7' * 17}"])
def test_other_names_are_left_out(name):
    assert workers([Entry(True, name, card())]) == {}


@pytest.mark.parametrize(
    "content", [None, [], 3, "x", {}, {"card_json": []}, {"transport": 3}, {"transport": {"tcp": 3}}]
)
def test_whatever_an_entry_holds(content):
    (worker,) = workers([Entry(True, NAME, content), Entry(False, NAME, content)]).values()
    assert (worker.models, worker.status) == ([], None)


def test_files(tmp_path):
    for directory, content in (("instances", INSTANCE), ("mdc", card(":9090"))):
        place = tmp_path / "v1" / directory
        place.mkdir(parents=True)
        (place / quote(NAME, safe="")).write_text(json.dumps(content))
        (place / quote("production/backend/generate/88", safe="")).write_text(json.dumps(content))
    (tmp_path / "v1" / "mdc" / quote("prod/backend/generate/99", safe="")).write_bytes(b"\xff[[")
    (tmp_path / "v1" / "mdc" / quote("prod/backend/generate/aa", safe="")).symlink_to("/nowhere")
    reader = FleetReader("file", str(tmp_path))
    found = workers(reader.read("prod/"))
    assert {instance: str(worker.status) for instance, worker in found.items()} == {
        "77": "10.0.0.7:9090",
        "99": "None",
    }
    assert set(workers(reader.read("prod"))) == {"77", "88", "99"}
    with pytest.raises(FileNotFoundError):
        FleetReader("file", str(tmp_path / "missing")).read("")


def test_no_more_entries_than_a_terminal_can_use(monkeypatch, tmp_path):
    monkeypatch.setattr(fleet_reader, "MOST_ENTRIES", 3)
    (tmp_path / "v1" / "mdc").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "v1" / "mdc" / f"a%2Fb%2Fc%2F{number}").write_text("{}")
    assert len(FleetReader("file", str(tmp_path)).read("")) == 3


def test_keys_of_etcd_page_by_page(monkeypatch):
    monkeypatch.setattr(fleet_reader, "_KEYS_AT_ONCE", 2)
    keys = {f"v1/instances/prod/backend/generate/{number:x}": INSTANCE for number in range(1, 6)}
    keys |= {f"v1/mdc/prod/backend/generate/{number:x}": card(":9090") for number in range(1, 6)}
    keys |= {"v1/mdc/zoo/backend/generate/a": card(), "v1/mdc/pro/backend/generate/b": card(), "v1/zzz": {}}
    calls = []

    def call(_gateway, path, body):
        calls.append(path)
        first, end = (base64.b64decode(body[name]).decode() for name in ("key", "range_end"))
        found = [key for key in sorted(keys) if first <= key < end]
        kvs = [
            {
                name: base64.b64encode(text.encode()).decode()
                for name, text in (("key", key), ("value", json.dumps(keys[key])))
            }
            for key in found[: body["limit"]]
        ]
        return {"kvs": kvs, "more": len(found) > body["limit"]}

    monkeypatch.setattr(Gateway, "call", call)
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://etcd:2379")
    reader = FleetReader("etcd")
    assert reader.place == "etcd: http://etcd:2379"
    found = workers(reader.read("prod/"))
    assert sorted(found) == ["1", "2", "3", "4", "5"]
    assert {str(worker.status) for worker in found.values()} == {"10.0.0.7:9090"}
    assert calls == ["/v3/kv/range"] * 6
    assert {worker.namespace for worker in workers(reader.read("")).values()} == {"prod", "pro", "zoo"}


def test_custom_resources_page_by_page(monkeypatch):
    def resource(number):
        name = f"prod/backend/generate/{number}"
        return {"spec": {"data": {"endpoints": {name: INSTANCE}, "model_cards": {name: card(":9090")}}}}

    pages = {
        "": ([resource(1), None, {"spec": 3}], "more"),
        "more": ([resource(2), {"spec": {"data": {"endpoints": 3}}}], ""),
    }
    monkeypatch.setattr(kubernetes, "in_cluster", lambda: True)
    monkeypatch.setattr(kubernetes, "page", lambda count, after, deadline: pages[after])
    found = workers(FleetReader("kubernetes").read("prod/"))
    assert {instance: str(worker.status) for instance, worker in found.items()} == {
        "1": "10.0.0.7:9090",
        "2": "10.0.0.7:9090",
    }


def test_outside_of_a_pod(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UsageError, match="in a pod only"):
        FleetReader("kubernetes")


@pytest.mark.parametrize(
    ("host", "requests", "expected"),
    [
        ("10.0.0.1", "", "10.0.0.1:9090"),
        ("0.0.0.0", "", ":9090"),
        ("::", "10.0.0.2", "10.0.0.2:9090"),
        ("0.0.0.0", "0.0.0.0", ":9090"),
        ("0.0.0.0", "a-name", ":9090"),
        ("fd00::1", "", "[fd00::1]:9090"),
    ],
)
def test_what_a_worker_publishes(monkeypatch, host, requests, expected):
    monkeypatch.setenv("DYN_TCP_RPC_HOST", requests)
    assert _published(host, 9090) == expected
    info = model_card.completed(EngineInfo("m", "/m", runtime_data={"a": 1}), WorkerSettings(), {}, expected)
    assert info.runtime_data == {STATUS_ADDRESS: expected, "a": 1}


def test_a_worker_without_a_status_server_publishes_nothing():
    assert model_card.completed(EngineInfo("m", "/m"), WorkerSettings()).runtime_data == {}
