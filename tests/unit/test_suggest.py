"""Guessing what was meant."""

from __future__ import annotations

import time

import pytest

from dynamo_worker.suggest import suggestion


def test_suggestion():
    assert suggestion("vlm", ["echo", "vllm"]) == ", did you mean vllm?"
    assert suggestion("toi", ["echo", "toy"]) == ", did you mean toy?"
    assert suggestion("something", ["echo", "vllm"]) == ""


FLAGS = [
    *(
        "--ep",
        "--tp-size",
        "--pp",
        "--dcp",
        "--engine",
        "--grace-period",
        "--drain",
        "--json",
        "--size",
        "--min-tokens",
    ),
    *(
        "--min-tokens",
        "--enable-radix-cache",
        "--dyn-tool-call-parser",
        "--tensor-parallel-size",
        "--pipeline-parallel-size",
    ),
    *("--max-model-len", "--served-model-name", "--warmup", "--log-level", "--kv-events-config", "--prefill-size"),
]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        # Wrong letters, swapped letters, letters too many.
        ("--egine", "--engine"),
        ("--grace-perid", "--grace-period"),
        ("--drian", "--drain"),
        ("--jsn", "--json"),
        ("--sise", "--size"),
        ("--max-modle-len", "--max-model-len"),
        ("--warm-up", "--warmup"),
        ("--graceperiod", "--grace-period"),
        ("--max_model_len", "--max-model-len"),
        # A word too few or too many.
        ("--tool-call-parser", "--dyn-tool-call-parser"),
        ("--model-name", "--served-model-name"),
        ("--kv-events", "--kv-events-config"),
        ("--tensor-parallel", "--tensor-parallel-size"),
        ("--tensor-parallelism-size", "--tensor-parallel-size"),
        # Short names are names of their own.
        ("--tp", None),
        ("--dp", None),
        ("--cp", None),
        ("--pcp", None),
        ("--seed", None),
        ("--model", None),
        ("--max-model-length", None),
        # The opposite is not meant.
        ("--max-tokens", None),
        ("--disable-radix-cache", None),
        ("--no-grace-period", None),
        ("--decode-size", None),
        # Several are as likely.
        ("--parallel-size", None),
        ("--enable-metrics", None),
    ],
)
def test_flags(given, meant):
    assert suggestion(given, FLAGS) == (f", did you mean {meant}?" if meant else "")


def test_words():
    assert suggestion("complete", ["chat", "completions", "classify"]) == ", did you mean completions?"
    assert suggestion("handof", ["complete", "handoff", "abort"]) == ", did you mean handoff?"
    assert suggestion("max_modl_len", ["max_model_len", "max_num_seqs"]) == ", did you mean max_model_len?"


def test_a_long_word_takes_no_time():
    started = time.process_time()
    known = [f"--{'ab' * 20}-{i}" for i in range(100)]
    for word in ("--" + "ab" * 50_000 + "-c" * 50, "--" + "ba" * 20 + "-c" * 8):
        assert suggestion(word, known) == ""
    assert time.process_time() - started < 5
