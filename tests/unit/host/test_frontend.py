"""`dynamo-worker frontend`: its address, its command line and its variables."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynamo_worker.address import Address, resolve
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.options import BY_NAME, FRONTEND_OPTIONS
from dynamo_worker.host.frontend import main as frontend
from dynamo_worker.host.frontend.main import parse_address
from dynamo_worker.supervisor import linux

# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("frontend.svc:65535", ("frontend.svc", 65535)),
        (":9000", ("127.0.0.1", 9000)),
        ("9000", ("127.0.0.1", 9000)),
        ("localhost", ("localhost", 8000)),
        ("[::1]:9000", ("::1", 9000)),
        ("[::]", ("::", 8000)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["host:", "host:0", "host:65536", "host:http", "a b:1", "http://host:1", "::1:80"])
def test_what_is_no_address_says_how_one_looks(text):
    with pytest.raises(UsageError, match="HOST:PORT") as raised:
        parse_address(text)
    assert repr(text) in str(raised.value)


@given(st.text(max_size=30) | st.from_regex("[a-z0-9.:\\[\\]-]{0,12}:[0-9\u0660-\u0669\u00b2]{0,7}", fullmatch=True))
@example("1" * 5000)
@example("host:" + "1" * 5000)
@example("host:²")
@example("host:٣")
def test_any_text_is_an_address_or_refused(text):
    try:
        address = parse_address(text)
    except UsageError:
        return
    assert 0 < address.port < 65536
    assert address.host
    assert parse_address(str(address)) == address, "what is printed can be typed"


def test_host_names_become_addresses_because_the_runtime_takes_nothing_else():
    assert Address("localhost", 8000).resolved("--http") == ("127.0.0.1", 8000)
    assert Address("::1", 8000).resolved("--http") == ("::1", 8000)
    assert Address("0.0.0.0", 8000).resolved("--http") == ("0.0.0.0", 8000)


def test_ipv4_comes_first_where_a_name_has_both(monkeypatch):
    both = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert resolve("both", "--http both") == "127.0.0.1"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a..b", "x" * 300])
def test_a_name_that_does_not_resolve_is_a_mistake_of_the_usage(host):
    with pytest.raises(UsageError, match="cannot resolve host") as raised:
        Address(host, 8000).resolved("--http")
    assert f"--http {host}:8000: cannot resolve host {host!r}" in str(raised.value)


# ------------------------------------------------------------------------------------------------------ command line


def test_every_router_mode_exists_in_dynamo():
    from dynamo.llm import RouterMode

    assert all(hasattr(RouterMode, name) for name in frontend.ROUTER_MODES.values())


def test_every_router_mode_of_the_options_is_dynamos():
    assert tuple(frontend.ROUTER_MODES) == BY_NAME["router_mode"].choices


def test_help_is_that_of_the_options():
    text = "".join(frontend.parser().format_help().split())  # wherever its lines break
    for option in FRONTEND_OPTIONS:
        assert option.flag in text
        assert "".join(option.summary.split()) in text


def test_dynamos_variables_are_the_defaults(monkeypatch):
    monkeypatch.setenv("DYN_MIGRATION_LIMIT", "5")
    monkeypatch.setenv("DYN_ROUTER_MODE", "random")
    args = frontend.parser().parse_args([])
    assert (args.migration_limit, args.router_mode) == (5, "random")
    assert frontend.parser().parse_args(["--migration-limit", "0"]).migration_limit == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DYN_MIGRATION_LIMIT", "many"),
        ("DYN_MIGRATION_LIMIT", "-1"),
        ("DYN_MIGRATION_LIMIT", "4294967296"),
        ("DYN_MIGRATION_LIMIT", "1" * 5000),
        ("DYN_WORKER_LOG_LEVEL", "trace"),
        ("DYN_WORKER_LOG_FORMAT", "xml"),
        ("DYN_ROUTER_MODE", "best"),
        ("DYN_DISCOVERY_BACKEND", "zookeeper"),
        ("DYN_REQUEST_PLANE", "http"),
        ("DYN_EVENT_PLANE", "tcp"),
    ],
)
def test_a_wrong_variable_is_a_mistake_of_the_usage(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as raised:
        frontend.parser().parse_args([])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert ": expected " in error
    assert f"(from {variable})" in error
    assert value in error


@pytest.mark.parametrize("text", ["abc", "-1", "nan", "inf", "1e8"])
def test_a_wrong_limit_for_the_end_is_a_mistake_of_the_usage(monkeypatch, text):
    monkeypatch.setenv("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", text)
    with pytest.raises(UsageError, match=f"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS={text}"):
        frontend._drain_seconds()


def test_an_empty_variable_counts_as_unset(monkeypatch):
    for name in ("DYN_EVENT_PLANE", "DYN_MIGRATION_LIMIT", "DYN_WORKER_LOG_LEVEL", "DYN_DISCOVERY_BACKEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "")
    args = frontend.parser().parse_args([])
    assert (args.event_plane, args.migration_limit, args.log_level) == (None, 3, "info")
    assert args.discovery_backend == "file"
    assert frontend._drain_seconds() == 5


def test_case_does_not_matter_as_for_the_worker(monkeypatch):
    monkeypatch.setenv("DYN_WORKER_LOG_LEVEL", "INFO")
    assert frontend.parser().parse_args([]).log_level == "info"


def test_one_whose_worker_is_gone_already_does_not_begin(monkeypatch):
    monkeypatch.setenv("DYNAMO_WORKER_FRONTEND_OF", str(os.getpid()))  # not the parent of this very process
    monkeypatch.setattr(linux, "on_parent_death", lambda number, parent: parent != os.getpid())
    assert frontend.main(["--http", "nonsense:nonsense"]) == 0
