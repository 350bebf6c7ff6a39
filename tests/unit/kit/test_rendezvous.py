"""Where an engine's processes meet, as far as PyTorch is not needed; the plugins' tests have the stores themselves."""

from __future__ import annotations

import os

import pytest

from dynamo_worker.kit import rendezvous


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, ("lo", "127.0.0.1")), ({"GLOO_SOCKET_IFNAME": "", "X_HOST": ""}, ("lo", "127.0.0.1"))],
    ids=["unset", "empty"],
)
def test_engines_stay_on_loopback(monkeypatch, before, after):
    for name in ("GLOO_SOCKET_IFNAME", "X_HOST"):
        monkeypatch.setenv(name, before.get(name, ""))
        if name not in before:
            monkeypatch.delenv(name)
    rendezvous.stay_on_loopback("X_HOST")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["X_HOST"]) == after


def test_what_the_operator_has_set_counts(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("X_HOST", "192.0.2.1")
    rendezvous.stay_on_loopback("X_HOST")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["X_HOST"]) == ("eth0", "192.0.2.1")
