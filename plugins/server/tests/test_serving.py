"""Whole workers behind a real frontend."""

from __future__ import annotations

import shlex, json, urllib.request
from typing import TYPE_CHECKING

import pytest
from conftest import fake

from dynamo_worker.testing import Subject

if TYPE_CHECKING:
    from dynamo_worker.testing import Cluster


@pytest.fixture
def subject() -> Subject:
    return Subject("server", ["--server-command", shlex.join(fake())], model="fake")


def test_serves(cluster: Cluster) -> None:
    ws=cluster.serve(2, "--served-model-name", "fake,other", "--dump-config-to", "/dev/null")
    result = cluster.ask(6, "one two")
    assert result.text.startswith("one two one two")
    print(json.load(urllib.request.urlopen(cluster.url + "/v1/models")))
    for f in cluster.discovery.rglob("*"):
        if f.is_file(): print(f, f.read_text()[:3000])
    print(ws[1].log)
    assert 0
