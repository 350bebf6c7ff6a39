"""Every bug of the buggy engine is found, by the check whose name says it; without a bug there is no finding."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.conformance import EngineConformance

PLUGINS = Path(__file__).parents[1] / "plugins"
#: The check that finds each bug.
FOUND_BY = {
    # chunks
    "ids-beyond-the-vocabulary": "token_ids_lie_in_the_vocabulary",
    "tokens-are-no-integers": "token_ids_are_integers",
    "no-finish-reason": "an_answer_ends_with_a_finish_reason",
    "two-finish-reasons": "an_answer_has_one_finish_reason",
    "unknown-finish-reason": "finish_reasons_are_known",
    "chunk-after-the-finish": "no_chunk_follows_the_finish",
    "chunks-repeat-old-tokens": "chunks_have_new_tokens_only",
    "unknown-chunk-field": "fields_of_chunks_are_known",
    "chunk-is-reused": "each_chunk_is_an_object_of_its_own",
    "no-vocabulary": "the_engine_says_its_vocabulary",
    "wrong-engine-info": "sizes_are_positive",
    # lengths, usage, log probabilities, fields
    "max-tokens-exceeded": "max_tokens_is_kept",
    "never-finishes": "an_answer_ends_by_itself",
    "stop-token-ignored": "a_stop_token_ends_the_answer",
    "usage-is-wrong": "usage_counts_the_answer",
    "log-probabilities-of-wrong-shape": "each_token_has_a_log_probability",
    "log-probabilities-are-positive": "log_probabilities_are_not_positive",
    "log-probabilities-unasked": "no_log_probabilities_unless_asked_for",
    "field-ignored": "log_probabilities_are_there_or_refused",
    "unknown-field-ignored": "an_unknown_field_is_refused_by_name",
    "bad-value-is-a-crash": "a_wrong_type_is_no_crash",
    # requests beside each other, errors
    "mixes-streams": "streams_do_not_mix",
    "second-request-fails": "the_second_request_is_answered",
    "wrong-token-kills": "a_wrong_token_does_not_kill_the_engine",
    "canary-is-shared": "each_canary_is_an_object_of_its_own",
    "canary-is-long": "the_canary_asks_for_one_token",
    # cancellation
    "ignores-abort": "the_work_of_a_cancelled_request_stops",
    "cancellation-is-ignored": "a_cancelled_request_ends_promptly",
    "abort-of-an-unknown-id-fails": "an_abort_of_an_unknown_id_does_nothing",
    "abort-ends-all": "an_abort_ends_no_other_request",
    "abort-hangs": "an_abort_returns_promptly",
    "no-abort": "every_method_of_the_protocol_is_there",
    # the event loop
    "blocks-the-loop": "generate_does_not_block_the_loop",
    "health-check-blocks": "check_health_does_not_block_the_loop",
    # health, progress, death
    "health-check-lies": "the_health_check_tells_of_a_death",
    "health-check-hangs": "a_health_check_answers_in_time",
    "swallows-its-death": "a_death_is_not_swallowed",
    "hides-its-process": "processes_of_the_engine_are_named",
    "progress-while-stuck": "an_idle_engine_makes_no_progress",
    "progress-goes-back": "progress_does_not_decrease",
    # metrics
    "invalid-metrics": "each_series_is_there_once",
    "metrics-take-the-workers-names": "metrics_do_not_take_the_workers_names",
    # the life of the engine
    "create-starts-a-process": "creating_starts_no_process",
    "create-starts-a-thread": "creating_starts_no_thread",
    "start-twice-is-broken": "an_engine_can_be_started_again",
    "stop-in-mid-start-leaves-a-process": "a_stop_in_the_middle_of_the_start_leaves_nothing",
    "drain-ends-the-engine": "a_drained_engine_serves_again",
    "drain-hangs": "a_hook_of_the_stop_works[drain]",
    "cleanup-hangs": "a_hook_of_the_stop_works[cleanup]",
    "cleanup-blocks": "cleanup_keeps_its_deadline",
    "cleanup-needs-a-start": "cleanup_of_an_engine_that_never_started",
    "cleanup-is-not-idempotent": "a_hook_of_the_stop_works[second cleanup]",
    # what is left
    "cleanup-leaves-the-process": "cleanup_ends_every_process",
    "leaks-a-child": "cleanup_ends_every_process",
    "leaks-a-thread": "cleanup_ends_every_thread",
    "leaks-a-task": "cleanup_ends_every_task",
    "leaks-a-segment": "cleanup_removes_every_segment",
    "leaks-a-file": "cleanup_removes_every_file",
    "leaks-a-socket": "cleanup_closes_every_socket",
    "leaks-a-descriptor": "cleanup_closes_every_descriptor",
    "signal-handlers": "signal_handlers_are_left_alone",
    "changes-directory": "the_current_directory_is_left_alone",
    # an engine that takes text
    "text-ignores-stop-strings": "a_stop_string_ends_the_answer[list]",
    "text-ignores-unknown-fields": "an_unknown_field_of_the_body_is_refused_by_name",
    "text-counts-unasked": "a_stream_is_not_counted_unasked",
    "text-is-never-counted": "an_answer_without_a_stream_is_counted",
    "text-has-no-model": "chunks_have_the_form_of_the_api",
    "text-repeats-old-text": "chunks_have_new_text_only",
    # an engine that makes embeddings
    "embedding-loses-the-last": "each_input_has_its_vector",
    "embedding-sorts-by-length": "vectors_are_in_the_order_of_the_inputs",
    "embedding-is-not-finite": "numbers_are_finite",
    "embedding-is-too-long": "vectors_have_the_promised_dimensions",
    "embedding-ignores-dimensions": "vectors_can_be_shorter[half]",
    "embedding-sees-lengths-only": "different_inputs_have_different_vectors",
    "embedding-is-never-counted": "tokens_are_counted",
    "embedding-comes-twice": "an_answer_comes_in_one_piece",
    "embedding-has-one-turn": "a_small_batch_does_not_wait_for_a_large_one",
    "embedding-goes-on-for-nobody": "a_cancelled_request_ends_promptly",
    # before any engine exists
    "help-imports-the-engine": "importing_the_plugin_imports_no_engine",
    "help-cannot-be-shown": "help_can_be_shown",
    "flag-collides": "flags_do_not_collide_with_the_workers",
    "prepare-blocks": "prepare_returns_at_once",
}


def run(module: str, *arguments: str, bug: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BUGGY_BUG": bug, "PYTHONPATH": str(PLUGINS)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_bug_is_found(bug: str) -> None:
    result = run("dynamo_worker.testing.conformance_run", "buggy", FOUND_BY[bug], "", bug=bug)
    assert result.returncode == 1, result.stdout + result.stderr
    name = FOUND_BY[bug].replace("_", " ")
    assert "FAIL   1/" in result.stdout or " FAIL " in result.stdout
    assert name in result.stdout.partition(" FAIL ")[2], result.stdout


#: Bugs that `check` alone finds, and what it says.
CHECKED = {
    "async-create-engine": (3, "create_engine is a coroutine function"),
    "no-abort": (3, "has no method 'abort'"),
    "wrong-api-version": (3, "version 0.9 of the plugin API"),
    "flag-collides": (0, "its flag --namespace is the worker's, too"),
}


@pytest.mark.parametrize("bug", CHECKED)
def test_check_notices(bug: str) -> None:
    code, message = CHECKED[bug]
    result = run("dynamo_worker", "check", "buggy", bug=bug)
    assert result.returncode == code, result.stdout + result.stderr
    assert message in result.stdout + result.stderr


def test_a_finding_says_what_where_and_why() -> None:
    result = run("dynamo_worker", "check", "buggy", "--conformance", "--only", "leaves every file", bug="leaks-a-file")
    assert result.returncode == 2, "no check has these words"
    arguments = ("check", "buggy", "--conformance", "--only", "cleanup removes every", "--", "--step-seconds", "0.002")
    result = run("dynamo_worker", *arguments, bug="leaks-a-file")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "a file is left: /tmp/buggy-" in result.stdout
    assert f"where: {PLUGINS / 'buggy_engine.py'}:" in result.stdout
    assert "why it matters: Files outside of the private directory and TMPDIR are removed by nobody." in result.stdout
    assert "buggy: 1 finding; 1 checks passed" in result.stdout


_SOURCES = ("buggy_engine.py", "buggy_text.py", "buggy_embedding.py", "dynamo_worker_buggy.py")


def test_every_bug_of_the_engine_is_in_the_table() -> None:
    source = "".join((PLUGINS / name).read_text() for name in _SOURCES)
    named = set(re.findall(r'BUG (?:==|!=) "([a-z-]+)"', source))
    for several in re.findall(r"BUG in \(([^)]+)\)", source):
        named |= set(re.findall(r'"([a-z-]+)"', several))
    assert named == FOUND_BY.keys() | CHECKED.keys()


def test_the_engine_that_makes_embeddings_has_no_other_bug() -> None:
    result = run("dynamo_worker.testing.conformance_run", "buggy", "vector", "", bug="embedding-")
    assert result.returncode == 0, result.stdout + result.stderr


class TestNoBug(EngineConformance):
    """The same engine without a bug."""

    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(PLUGINS))

    @pytest.fixture
    def subject(self, installed: None) -> Subject:
        return Subject("buggy")
