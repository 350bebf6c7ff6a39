"""Which address of this machine engines tell to others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from dynamo_worker.kit import own_address

VARIABLE = "TOY_HOST"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "DYN_TCP_RPC_HOST"):
        monkeypatch.setenv(name, "")  # so that it is removed in the end
        monkeypatch.delenv(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What this machine knows of itself: addresses of its name, and those from which its routes start."""
    known: dict[str, list[str]] = {"name": [], "routes": []}
    monkeypatch.setattr(own_address, "_of_name", lambda: iter(known["name"]))
    monkeypatch.setattr(own_address, "_of_routes", lambda: iter(known["routes"]))
    return known


@pytest.mark.parametrize(
    ("own", "name", "routes", "expected"),
    [
        ("", ["127.0.1.1", "10.0.0.5"], ["10.0.0.6"], "10.0.0.5"),
        ("", ["127.0.1.1", "::1"], ["192.168.1.2", "fd00::2"], "192.168.1.2"),
        ("", ["fe80::1"], ["fd00::2"], "fd00::2"),
        ("", ["2001:db8::5"], [], "2001:db8::5"),
        ("10.1.1.1", ["10.0.0.5"], [], "10.1.1.1"),
        ("127.0.0.1", ["10.0.0.5"], [], "127.0.0.1"),
        ("::1", ["10.0.0.5"], [], "::1"),
        ("0.0.0.0", ["10.0.0.5"], [], "10.0.0.5"),
        ("a-name", ["10.0.0.5"], [], "10.0.0.5"),
    ],
)
def test_the_address(
    machine: Any, monkeypatch: pytest.MonkeyPatch, own: str, name: list[str], routes: list[str], expected: str
) -> None:
    machine.update(name=name, routes=routes)
    if own:
        monkeypatch.setenv("DYN_TCP_RPC_HOST", own)
    assert own_address.advertise(VARIABLE) == os.environ[VARIABLE] == expected


def test_what_the_operator_has_set_counts(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine["name"] = ["10.0.0.5"]
    monkeypatch.setenv(VARIABLE, "localhost")
    assert own_address.advertise(VARIABLE) == os.environ[VARIABLE] == "localhost"


def test_a_machine_by_itself_says_so(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine.update(name=["127.0.1.1"], routes=[])
    assert own_address.advertise(VARIABLE) == "127.0.0.1"
    assert "Only loopback is known of this machine" in caplog.text


@pytest.mark.parametrize("error", [socket.gaierror("no such name"), UnicodeError("label too long")], ids=repr)
def test_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert list(own_address._of_name()) == []


def test_only_addresses_of_this_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server may still know the machine that had the name before."""
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.77", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert list(own_address._of_name()) == ["127.0.0.2", "::1"]


ONLY_IPV6 = """
ip link set lo up && ip -6 addr add fd00:77::7/64 dev lo nodad && ip -6 route add default dev lo || exit 77
exec "$@"
"""


def test_a_machine_with_ipv6_alone() -> None:
    """The real look-up, in a network that has nothing else."""
    code = f"from dynamo_worker.kit.own_address import advertise; print(advertise({VARIABLE!r}))"
    command = ["unshare", "-rn", "sh", "-c", ONLY_IPV6, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"no network of our own here: {done.stderr.strip()[-200:]}")
    assert done.stdout.strip() == "fd00:77::7", done.stderr
