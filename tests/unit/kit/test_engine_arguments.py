"""Flags of engines, and what is said where an engine cannot be imported."""

from __future__ import annotations

import argparse
import sys

import pytest

from dynamo_worker import StartError
from dynamo_worker.engine import EngineContext
from dynamo_worker.kit.engine_arguments import (
    EarlyParser,
    add_publish_kv_events,
    disaggregation_mode,
    drop_unread_events,
    import_engine,
    keyword,
    kv_events_config,
    non_negative,
    refuse_without_effect,
    served_names,
    switched_on,
)


def test_a_module_of_an_engine():
    assert import_engine("json.decoder", name="Toy", install="pip install toy").JSONDecoder


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("", "the Toy engine needs the Python package 'toy_engine.args'", "pip install toy"),
        ("import no_such_package", "the Toy engine needs the Python package 'no_such_package'", "pip install toy"),
        (
            "from json import no_such_name",
            "Toy cannot be imported: cannot import name",
            "python -c 'import toy_engine'",
        ),
        ("raise OSError('libcuda.so.1')", "Toy cannot be imported: libcuda.so.1", "python -c 'import toy_engine'"),
        ("raise RuntimeError('no GPU')", "Toy cannot be imported: no GPU", "python -c 'import toy_engine'"),
    ],
)
def test_an_engine_that_cannot_be_imported(tmp_path, monkeypatch, source, message, hint):
    (tmp_path / "toy_engine").mkdir()
    (tmp_path / "toy_engine" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_engine", raising=False)
    with pytest.raises(StartError) as caught:
        import_engine("toy_engine.args", name="Toy", install="pip install toy")
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)


def test_publish_kv_events():
    parser = argparse.ArgumentParser()
    add_publish_kv_events(parser.add_argument_group("toy"))
    assert not parser.parse_args([]).publish_kv_events
    assert parser.parse_args(["--publish-kv-events"]).publish_kv_events


def test_flags_are_read_early():
    parser = EarlyParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--deep", choices=["yes", "no"])
    assert parser.read(["--model", "m", "--ranks", "2", "--help"]).ranks == 2
    assert parser.read([]).ranks == 1
    for wrong in (["--ranks"], ["--ranks", "two"], ["--deep", "maybe"]):
        assert parser.read(wrong) is None


def test_flags_without_effect_are_refused_by_name():
    def add_flags(parser):
        parser.add_argument("--api-key")
        parser.add_argument("--limit", type=int, default=3)

    def check(*argv):
        parser = argparse.ArgumentParser()
        add_flags(parser)
        refuse_without_effect(parser.parse_args(argv), add_flags, ("api_key", "limit", "gone"), "nobody reads it")

    check()
    check("--limit", "3")
    with pytest.raises(StartError, match="--api-key has no effect in a worker: nobody reads it") as raised:
        check("--api-key", "secret")
    assert "secret" not in str(raised.value)
    with pytest.raises(StartError, match="--api-key, --limit have no effect"):
        check("--api-key", "secret", "--limit", "4")


@pytest.mark.parametrize(
    ("asked", "wanted", "published"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_events_that_no_router_reads_are_not_published(tmp_path, caplog, asked, wanted, published):
    args = argparse.Namespace(publish_kv_events=asked)
    context = EngineContext(component="ns.backend", private_dir=tmp_path, supervised=False, events_wanted=wanted)
    drop_unread_events(args, context)
    assert args.publish_kv_events is published
    assert ("KV events are not published" in caplog.text) == (asked and not wanted)


def test_the_socket_for_events_is_a_file_in_the_private_directory(tmp_path):
    config = kv_events_config(tmp_path)
    assert config == {"publisher": "zmq", "endpoint": f"ipc://{tmp_path}/kv-events-inproc", "topic": ""}


def test_numbers_of_at_least_0(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=non_negative)
    assert parser.parse_args(["--rate", "0"]).rate == 0.0
    assert parser.parse_args(["--rate", "2.5"]).rate == 2.5
    for wrong, message in (("-1", "expected a number of at least 0, got '-1'"), ("nan", "got 'nan'"), ("x", "'x'")):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--rate={wrong}"])
        assert message in capsys.readouterr().err


def test_a_flag_of_words() -> None:
    read = keyword({"agg": "both", "pd": "both", "prefill": "first"}, "agg or prefill", {"encode": "no images here"})
    assert [read(text) for text in ("agg", "pd", "prefill")] == ["both", "both", "first"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"^encode is not supported: no images here; expected agg or"):
        read("encode")
    with pytest.raises(argparse.ArgumentTypeError, match=r"^x is unknown; expected agg or prefill$"):
        read("x")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ("", []),
        (" a,b  c,", ["a", "b", "c"]),
        (["a b", "c,d"], ["a", "b", "c", "d"]),
        (["org/model"], ["org/model"]),
    ],
)
def test_served_names(given, names):
    assert served_names(given) == names


@pytest.mark.parametrize("word", ["agg", "pd", "aggregated", "prefill_and_decode", "null"])
def test_words_for_both_phases(word):
    assert disaggregation_mode("null")(word) == "null"


def test_one_phase():
    mode = disaggregation_mode()
    assert (mode("agg"), mode("prefill"), mode("decode")) == ("aggregated", "prefill", "decode")
    with pytest.raises(argparse.ArgumentTypeError, match="encode is not supported: this plugin serves"):
        mode("encode")
    with pytest.raises(argparse.ArgumentTypeError, match="prefil is unknown; expected agg, prefill or decode"):
        mode("prefil")


@pytest.mark.parametrize(("value", "on"), [("1", True), ("True", True), ("on", True), ("0", False), ("", False)])
def test_a_switch_in_the_environment(monkeypatch, value, on):
    monkeypatch.setenv("DYN_TOY_FAST", value)
    assert switched_on("DYN_TOY_FAST") is on
    assert switched_on("DYN_TOY_SLOW") is False
