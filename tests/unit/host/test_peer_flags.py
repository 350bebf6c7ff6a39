"""The flags of Dynamo's own workers: the table has all of them, and each one leads somewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_worker.cli.peer_words import check_variables, peer_flags, without_peer_flags
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.own_flags import SWITCHES, own_flags
from dynamo_worker.host.config.peer_flags import ENGINES, PEER_FLAGS

DOCS = Path(__file__).parents[3] / "docs"
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "peer_flags.json").read_text())


#: Flags that Dynamo's worker accepts outside its own parser: it adds values to them, or rewrites them.
BESIDE = {"--load-format", "--disaggregation-mode", "--disable-piecewise-cuda-graph"}
BESIDE |= {"--publish-events-and-metrics", "--no-publish-events-and-metrics"}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_flag_of_the_worker_is_in_the_table(engine):
    assert set(RECORDED[engine]) | BESIDE == peer_flags(engine).keys() | BESIDE


@pytest.mark.skipif("AI_DYNAMO" not in os.environ, reason="AI_DYNAMO: a directory with ai-dynamo, and no engine")
def test_the_record_is_the_workers_own():
    words = [sys.executable, DOCS / "peer_flags.py", os.environ["AI_DYNAMO"]]
    assert json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout) == RECORDED


def test_the_table_is_consistent():
    for row in PEER_FLAGS:
        assert row.verdict != "refused" or row.text, row.flag
        assert not row.text.endswith("."), row.flag
        assert not (row.switch and row.many), row.flag
        assert not row.harmless or row.verdict == "refused", row.flag
    for engine in ENGINES:
        names = [f for row in PEER_FLAGS if not row.engines or engine in row.engines for f in row.flags]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("row", [row for row in PEER_FLAGS if row.verdict == "honoured" and not row.engines], ids=str)
def test_what_all_workers_honour_is_an_option(row):
    if row.flag != "--fpm-trace":  # each engine measures its own forward passes
        assert {*row.flags} <= {*own_flags(), *SWITCHES}


@pytest.mark.parametrize("engine", ENGINES)
def test_refused_flags_say_why(engine):
    for flag, row in peer_flags(engine).items():
        if row.verdict == "refused" and not flag.startswith("--no-"):
            with pytest.raises(UsageError) as caught:
                without_peer_flags([flag] if row.switch else [flag, "x"], engine, ())
            message = str(caught.value)
            assert message.startswith(flag)
            assert " is not supported: " in message
            assert "\n" not in message


@pytest.mark.parametrize("engine", ENGINES)
def test_ignored_flags_vanish_with_their_values(engine):
    for flag, row in peer_flags(engine).items():
        if row.verdict == "ignored":
            words = [flag] if row.switch else [flag, "x"]
            assert without_peer_flags(["--a", *words, "--b"], engine, ()) == ["--a", "--b"]


@pytest.mark.parametrize(
    "words",
    [
        ["--no-route-to-encoder"],
        ["--embedding-worker-processes", "1"],
        ["--embedding-worker-processes=1"],
        ["--output-modalities", "text"],
        ["--output-modalities"],
        ["--connector", "none"],
        ["--connector"],
        ["--mm-prompt-template=x"],
        ["--health-check-payload", "{}"],
    ],
)
def test_what_asks_for_nothing_is_accepted(words):
    assert without_peer_flags(words, "vllm", ()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--connector", "nixl"], "--connector nixl is not supported: name the connector in --kv-transfer-config"),
        (["--connector", "none", "lmcache"], "--connector none lmcache is not supported"),
        (["--output-modalities", "text", "image"], "--output-modalities text image is not supported"),
        (["--embedding-worker-processes=2"], "--embedding-worker-processes 2 is not supported"),
        (["--disaggregation-mode", "encode"], "--disaggregation-mode encode is not supported"),
        (["--disaggregation-mode=encode"], "--disaggregation-mode encode is not supported"),
        (["--load-format", "gms"], "--load-format gms is not supported: this worker does not use"),
        (
            ["--classify-worker"],
            "--classify-worker is not supported: this worker serves text generation",
        ),
        (["--fpm-trace"], "--fpm-trace is not supported with this engine"),
    ],
)
def test_values_that_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        without_peer_flags(words, "vllm", ("--disaggregation-mode", "--load-format"))


def test_values_that_are_honoured_reach_the_engine():
    words = ["--disaggregation-mode", "pd", "--load-format=dummy", "--model", "m"]
    assert without_peer_flags(words, "vllm", ("--disaggregation-mode", "--load-format", "--model")) == words


def test_a_switch_is_turned_off_again():
    assert without_peer_flags(["--headless", "--no-headless"], "vllm", ("--headless",)) == []
    assert without_peer_flags(["--no-headless", "--headless"], "vllm", ("--headless",)) == ["--headless"]


def test_the_flag_of_somebody_elses_engine_is_its_own():
    assert without_peer_flags(["--realtime", "--connector", "usb"], "toy", ()) == ["--realtime", "--connector", "usb"]
    known = ("--output-modalities",)
    assert without_peer_flags(["--output-modalities", "image"], "toy", known) == ["--output-modalities", "image"]


@pytest.mark.parametrize(
    ("engine", "variable", "value"),
    [
        ("vllm", "DYN_VLLM_CLASSIFY_WORKER", "true"),
        ("vllm", "DYN_BENCHMARK_MODE", "agg"),
        ("vllm", "DYN_CONNECTOR", "nixl"),
        ("sglang", "DYN_SGL_ENABLE_MULTIMODAL", "1"),
        ("sglang", "DYN_SGL_GATEWAY_WORKERS", "4"),
        ("trtllm", "DYN_TRTLLM_ENABLE_MULTIMODAL", "on"),
        ("echo", "DYN_SNAPSHOT_CONTROL_DIR", "/s"),
        ("vllm", "DYN_GMS_USE_V1", "true"),
    ],
)
def test_variables_that_are_refused(engine, variable, value):
    with pytest.raises(UsageError, match=f"^{variable}={value} is not supported: "):
        check_variables(engine, {variable: value})


def test_variables_that_ask_for_nothing():
    harmless = {
        "DYN_VLLM_CLASSIFY_WORKER": "false",
        "DYN_VLLM_EMBEDDING_WORKER_PROCESSES": "1",
        "DYN_CONNECTOR": "none",
        "DYN_BENCHMARK_MODE": "",
        "DYN_SGL_ENABLE_MULTIMODAL": "true",
        "DYN_GMS_USE_V1": "false",
        "DYN_ROUTER_TEMPERATURE": "0.5",
        "DYN_OUTPUT_MODALITIES": "text",
    }
    check_variables("vllm", harmless)
    check_variables("toy", {"DYN_OUTPUT_MODALITIES": "image"})
