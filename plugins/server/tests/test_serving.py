"""Whole workers behind a real frontend."""

from __future__ import annotations

import shlex
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
    cluster.serve(1)
    result = cluster.ask(6, "one two")
    print(result)
    assert result.text.startswith("one two one two")
