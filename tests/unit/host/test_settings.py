"""The settings: names, defaults, precedence, origins and everything that can be wrong with a value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from dynamo_worker.address import Address
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.config_file import ConfigFile, read_config
from dynamo_worker.host.config.options import BY_NAME, OPTIONS
from dynamo_worker.host.config.settings import WorkerSettings, load


def config(**values):
    return ConfigFile(Path("w.yaml"), values)


def test_precedence():
    file = config(drain="abort", namespace="file", component="file")
    environ = {"DYN_WORKER_DRAIN": "handoff", "DYN_NAMESPACE": "env"}
    loaded = load({"drain": "complete"}, environ, file)
    assert (loaded.drain, loaded.namespace, loaded.component, loaded.endpoint) == (
        "complete",
        "env",
        "file",
        "generate",
    )
    assert [str(loaded.origin(name)) for name in ("drain", "namespace", "component", "endpoint")] == [
        "flag --drain",
        "environment DYN_NAMESPACE",
        "file w.yaml",
        "default",
    ]


def test_empty_variable_is_no_value():
    assert load({}, {"DYN_EVENT_PLANE": "", "DYN_WORKER_DRAIN": ""}).event_plane is None


def test_constructor_ignores_the_environment(monkeypatch):
    monkeypatch.setenv("DYN_WORKER_DRAIN", "abort")
    monkeypatch.setenv("drain", "abort")
    assert WorkerSettings().drain == "complete"


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        WorkerSettings().drain = "abort"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "backend"),
    [({}, "etcd"), ({"frontend": ""}, "file"), ({"frontend": "8000", "discovery_backend": "etcd"}, "etcd")],
)
def test_default_of_discovery_follows_the_frontend(flags, backend):
    assert load(flags, {}).discovery_backend == backend


@pytest.mark.parametrize(("drain", "grace"), [("complete", 5), ("handoff", 0), ("abort", 0)])
def test_default_of_grace_follows_the_drain_mode(drain, grace):
    assert load({"drain": drain}, {}).grace_period == grace
    assert load({"drain": drain, "grace_period": "3"}, {}).grace_period == 3


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1:9000", ("127.0.0.1", 9000)),
        ("9000", ("127.0.0.1", 9000)),
        (":9000", ("127.0.0.1", 9000)),
        ("0.0.0.0", ("0.0.0.0", 8000)),
        ("[::1]:9000", ("::1", 9000)),
        ("[::1]", ("::1", 8000)),
        ("true", ("127.0.0.1", 8000)),
        (True, ("127.0.0.1", 8000)),
        (9000, ("127.0.0.1", 9000)),
        ("off", None),
        (False, None),
    ],
)
def test_frontend_address(value, address):
    assert load({}, {}, config(frontend=value)).frontend == address


def test_address_is_shown_as_it_is_given():
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address("h", 80)) == "h:80"


@pytest.mark.parametrize("value", ["h:x", "h:70000", "h:0", "::1", "-1"])
def test_bad_frontend_address(value):
    with pytest.raises(UsageError, match=r"--frontend .* HOST:PORT"):
        load({"frontend": value}, {})


@pytest.mark.parametrize("value", ["dyn://ns.comp.ep", "ns.comp.ep"])
def test_endpoint_path_sets_all_three(value):
    loaded = load({}, {"DYN_ENDPOINT": value}, config(namespace="file"))
    assert (loaded.namespace, loaded.component, loaded.endpoint) == ("ns", "comp", "ep")
    assert str(loaded.origin("namespace")) == "environment DYN_ENDPOINT"


def test_stronger_source_overrides_a_part_of_the_path():
    assert load({"namespace": "flag"}, {"DYN_ENDPOINT": "ns.comp.ep"}).namespace == "flag"


def test_endpoint_path_contradicted_by_the_same_source():
    with pytest.raises(UsageError, match=r"--endpoint a\.b\.c conflicts with --namespace z"):
        load({"endpoint": "a.b.c", "namespace": "z"}, {})


@pytest.mark.parametrize("value", ["a.b", "dyn://a", "a..c", "a.b.c.d"])
def test_bad_endpoint_path(value):
    with pytest.raises(UsageError, match=r"dyn://namespace\.component\.endpoint"):
        load({"endpoint": value}, {})


@pytest.mark.parametrize("port", [-1, 0, 1, 65535])
def test_whole_port_range(port):
    assert load({"system_port": str(port)}, {}).system_port == port


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"drain": "handof"}, {}, "--drain handof: expected one of complete, handoff, abort, did you mean handoff?"),
        ({}, {"DYN_WORKER_DRAIN": "no"}, "DYN_WORKER_DRAIN=no: expected one of complete, handoff, abort"),
        ({"grace_period": "soon"}, {}, "--grace-period soon: expected a number of seconds between 0 and 604800"),
        ({"grace_period": "-1"}, {}, "--grace-period -1: expected a number of seconds between 0 and 604800"),
        (
            {"termination_grace_period": "0"},
            {},
            "-period 0: expected a number of seconds between 0.01 and",
        ),
        (
            {"termination_grace_period": "nan"},
            {},
            "--termination-grace-period nan: expected a number of seconds",
        ),
        ({"termination_grace_period": "3000000"}, {}, "3000000: expected a number of seconds between 0.01 and 604800"),
        (
            {"health_check_interval": "1e-9"},
            {},
            "-interval 1e-9: expected a number of seconds between 0.01 and",
        ),
        ({"stall_timeout": "inf"}, {}, "--stall-timeout inf: expected a number of seconds between 1 and"),
        ({"stall_timeout": "0.5"}, {}, "0.5: expected a number of seconds between 1 and 604800, or 0 for never"),
        (
            {},
            {"DYN_WORKER_HEARTBEAT_TIMEOUT": "3000000"},
            "TIMEOUT=3000000: expected a number of seconds",
        ),
        ({}, {"DYN_SYSTEM_PORT": "65536"}, "DYN_SYSTEM_PORT=65536: expected an integer between -1 and 65535"),
        ({"system_port": "-2"}, {}, "--system-port -2: expected an integer between -1 and 65535"),
        ({"system_port": "8.5"}, {}, "--system-port 8.5: expected an integer between -1 and 65535"),
        ({}, {"DYN_WORKER_WARMUP": "maybe"}, "DYN_WORKER_WARMUP=maybe: expected true or false"),
        ({"namespace": "a b"}, {}, "--namespace a b: expected letters, digits"),
        ({"endpoint_types": "chat,complete"}, {}, "expected chat, completions, embedding"),
        ({"control_load_root": ["adapters"]}, {}, "--control-load-root adapters: expected an absolute path"),
        ({"control_load_root": ["s3:bucket"]}, {}, "or a URI such as s3://bucket/adapters"),
        ({"control_write_root": ["s3://bucket"]}, {}, "expected an absolute path, got 's3://bucket'"),
        ({"endpoint_types": "none,chat"}, {}, "`none` cannot be combined"),
        ({"structural_tag": "maybe"}, {}, "--dyn-structural-tag maybe: expected true, false or a JSON object"),
        ({"structural_tag": '{"scop": "auto"}'}, {}, "unknown key 'scop', did you mean scope?"),
        ({"structural_tag": '{"scope": 1}'}, {}, 'scope: expected one of "auto", "always", got 1'),
        ({"structural_tag": '{"tool_arguments_any_order": 1}'}, {}, "expected one of true, false, got 1"),
        ({"structural_tag": "[" * 100_000}, {}, "expected true, false or a JSON object"),
        ({"structural_tag_scope": "x"}, {}, "--dyn-structural-tag-scope x: expected one of auto, always"),
        ({"default_thinking_mode": "on"}, {}, "--dyn-default-thinking-mode on: expected one of enabled, disabled"),
        ({"kv_state_endpoint": "a.b"}, {}, "--kv-state-endpoint a.b: expected a path dyn://namespace"),
        ({"log_level": "verbose"}, {}, "--log-level verbose: expected one of debug, info, warning, error"),
    ],
)
def test_wrong_value_names_its_place(flags, environ, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load(flags, environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.metavar == "SECONDS"], ids=lambda row: row.name)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "604801", "1e300"])
def test_no_duration_is_nonsense(row, value):
    with pytest.raises(UsageError, match=re.escape(row.flag)):
        load({row.name: value}, {})
    assert getattr(load({row.name: "604800"}, {}), row.name) == 604800


def test_wrong_value_in_the_file_names_key_and_file():
    with pytest.raises(UsageError, match=re.escape("`drain: later` in w.yaml: expected one of")):
        load({}, {}, config(drain="later"))


def test_several_problems_are_one_line_each():
    with pytest.raises(UsageError) as caught:
        load({"drain": "x", "system_port": "y"}, {"DYN_REQUEST_PLANE": "z"})
    assert len(str(caught.value).splitlines()) == 3


def test_lists():
    loaded = load({"plugin": ["a,b", "c"]}, {"DYN_WORKER_NO_PLUGIN": "d, e"}, config(endpoint_types=["chat"]))
    assert loaded.plugin == ("a", "b", "c")
    assert loaded.no_plugin == ("d", "e")
    assert loaded.endpoint_types == ("chat",)


def test_what_frontends_are_told():
    given = '{"scope": "auto", "exclude_special_tokens": null, "tool_arguments_any_order": true}'
    loaded = load({"structural_tag": given, "endpoint_types": "none"}, {"DYN_DEFAULT_THINKING_MODE": "disabled"})
    assert loaded.structural_tag == {
        "scope": "auto",
        "exclude_special_tokens": None,
        "tool_arguments_any_order": True,
    }
    assert (loaded.endpoint_types, loaded.default_thinking_mode) == (("empty",), "disabled")
    assert load({"structural_tag": "false"}, {}).structural_tag is False
    assert load({}, {"DYN_STRUCTURAL_TAG": "on"}).structural_tag is True
    assert load({}, {}).structural_tag is load({}, {}).enable_structural_tag is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grace_period": "30"}, "--termination-grace-period 30 (the default) conflicts with --grace-period 30"),
        ({"grace_period": "25"}, "3 s are missing"),
        ({"discovery_backend": "mem"}, "--discovery-backend mem isolates the worker"),
        ({"discovery_backend": "mem", "frontend": "8000"}, "conflicts with --frontend 127.0.0.1:8000"),
        (
            {"discovery_path": "/x"},
            "--discovery-path /x requires the `file` discovery backend",
        ),
        ({"frontend": "8000", "system_port": "8000"}, "they use the same port"),
        ({"control_token_file": "/t"}, "--control-token-file /t has no effect without --system-port"),
        ({"migration_limit": 5}, "--migration-limit 5 has no effect without --frontend"),
        (
            {"structural_tag": "true", "structural_tag_scope": "auto"},
            "--dyn-structural-tag true conflicts with --dyn-structural-tag-scope auto",
        ),
        ({"structural_tag": "false", "enable_structural_tag": True}, "conflicts with --dyn-enable-structural-tag"),
        ({"plugin": ["a"], "no_plugin": ["a"]}, "--plugin a conflicts with --no-plugin a"),
        ({"installed_plugins": "a,b", "no_plugin": ["a"]}, "--installed-plugins a b conflicts with --no-plugin a"),
    ],
)
def test_contradictions(flags, message):
    loaded = load(flags, {})
    with pytest.raises(UsageError, match=re.escape(message)):
        loaded.check()


@pytest.mark.parametrize(
    ("value", "expected"), [("none", ("none",)), ("a, b", ("a", "b")), ("all", ("all",)), (None, ("all",))]
)
def test_which_installed_plugins_are_loaded(value, expected):
    environ = {} if value is None else {"DYN_WORKER_INSTALLED_PLUGINS": value}
    assert load({}, environ).installed_plugins == expected


@pytest.mark.parametrize(("value", "message"), [(",", "expected `all`"), ("all,a", "cannot be combined")])
def test_a_list_of_plugins_that_could_mean_anything(value, message):
    with pytest.raises(UsageError, match=message):
        load({"installed_plugins": value}, {})


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        ({}, {}),
        ({"frontend": ""}, {}),
        ({}, {"DYN_FILE_KV": "/x", "DYN_ROUTER_MODE": "kv", "DYN_MIGRATION_LIMIT": "0"}),
        ({"frontend": "8000", "system_port": "0"}, {}),
        ({"drain": "handoff", "grace_period": "22"}, {}),
        ({"control_token_file": "/t", "system_port": "0"}, {}),
        ({}, {"DYN_WORKER_CONTROL_TOKEN_FILE": "/t"}),
        ({"control_load_root": ["/a,s3://bucket/a"], "control_write_root": ["/b"]}, {}),
    ],
)
def test_no_contradiction(flags, environ):
    load(flags, environ).check()


def write(tmp_path, text):
    path = tmp_path / "w.yaml"
    path.write_text(text)
    return path


def test_file(tmp_path):
    file = read_config(write(tmp_path, "drain: handoff\nsystem_port: 0\nengine_args:\n  size: 2\n"))
    assert load({}, {}, file).drain == "handoff"
    assert load({}, {}, file).system_port == 0
    assert file.engine_args == {"size": 2}


@pytest.mark.parametrize("word", ["yes", "true", "on", "no"])
@pytest.mark.parametrize("key", ["grace_period", "termination_grace_period", "system_port", "migration_limit"])
def test_yes_is_no_number(tmp_path, key, word):
    with pytest.raises(UsageError, match=f"`{key}: .*expected .*, got a boolean"):
        load({}, {}, read_config(write(tmp_path, f"{key}: {word}\n")))


def test_no_more_migrations_than_the_runtime_takes():
    assert load({"migration_limit": "4294967295"}, {}).migration_limit == 2**32 - 1
    with pytest.raises(UsageError, match="--migration-limit 4294967296"):
        load({"migration_limit": "4294967296"}, {})


def test_host_names_are_resolved_for_the_runtime(monkeypatch):
    settings = load({"frontend": "localhost:1234", "system_host": "localhost", "system_port": "0"}, {}).resolved()
    assert settings.frontend == ("127.0.0.1", 1234)
    assert settings.system_host == "127.0.0.1"
    assert settings.origin("frontend").kind == "flag"
    alone = load({"system_host": "no.such.host.invalid"}, {})
    assert alone.resolved().system_host == "no.such.host.invalid", "without a status server nobody asks for it"


@pytest.mark.parametrize(
    ("flags", "host"),
    [
        ({}, "0.0.0.0"),
        ({"frontend": True}, "127.0.0.1"),
        ({"frontend": "127.0.0.9:1"}, "127.0.0.1"),
        ({"frontend": "localhost"}, "127.0.0.1"),
        ({"frontend": "[::1]:8000"}, "127.0.0.1"),
        ({"frontend": "0.0.0.0:8000"}, "0.0.0.0"),
        ({"frontend": "192.0.2.1"}, "0.0.0.0"),
        ({"frontend": "no.such.host.invalid"}, "0.0.0.0"),
        ({"frontend": "127.0.0.1", "system_host": "192.0.2.1"}, "192.0.2.1"),
    ],
)
def test_the_status_server_is_where_the_frontend_is(flags, host):
    settings = load(flags, {})
    assert settings.system_host == host
    assert settings.on_loopback == str(flags.get("frontend", "")).startswith(("True", "127", "localhost", "[::1]"))
    assert load({**flags, "system_host": "192.0.2.2"}, {}).system_host == "192.0.2.2"


def test_in_a_pod_the_status_server_is_where_the_kubelet_asks(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    settings = load({"frontend": True}, {})
    assert settings.system_host == "0.0.0.0"
    assert settings.on_loopback


def test_events_are_for_routers_elsewhere_and_for_one_that_reads_them():
    assert load({}, {}).events_wanted
    assert not load({"frontend": True}, {}).events_wanted
    assert load({"frontend": "0.0.0.0"}, {}).events_wanted, "others may have routers, too"
    assert load({"frontend": True, "router_mode": "least-loaded"}, {}).events_wanted
    assert load({"frontend": True, "router_mode": "kv"}, {}).events_wanted


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"frontend": "no.such.host.invalid"}, {}, "--frontend no.such.host.invalid:8000: cannot resolve host"),
        ({}, {"DYN_WORKER_FRONTEND": "256.1.1.1:80"}, "DYN_WORKER_FRONTEND=256.1.1.1:80: cannot resolve host"),
        ({"system_port": "0"}, {"DYN_SYSTEM_HOST": "a..b"}, "DYN_SYSTEM_HOST=a..b: cannot resolve host"),
    ],
)
def test_a_name_that_does_not_resolve_is_named_as_it_was_given(flags, environ, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        load(flags, environ).resolved()


def test_every_field_is_an_option_with_its_default():
    assert {option.name for option in OPTIONS} == set(WorkerSettings.model_fields)
    for name, value in WorkerSettings().model_dump().items():
        if name not in ("discovery_backend", "grace_period", "system_host"):
            assert value == BY_NAME[name].default
        assert WorkerSettings.model_fields[name].description == BY_NAME[name].help
