"""Every expected error has its exit code and says what to do next."""

from __future__ import annotations

import pytest

from dynamo_worker import errors
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.plugins.installed_plugins import PluginRecord
from dynamo_worker.host.plugins.plugin_errors import PluginError, UnknownPluginError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), ExitCode.USAGE),
        (errors.StartError("x"), ExitCode.START_FAILED),
        (errors.EngineDeadError("x"), ExitCode.FATAL),
        (errors.EngineStalledError("x"), ExitCode.FATAL),
        (errors.DiscoveryLostError("x"), ExitCode.FATAL),
        (UnknownPluginError("x"), ExitCode.USAGE),
        (PluginError(PluginRecord("n", "g", "v"), "x"), ExitCode.START_FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_code(error, code):
    assert error.exit_code is code
    assert str(error) == "x"


def test_hint_is_a_line_of_its_own():
    assert str(errors.UsageError("what", hint="do this")) == "what\n  next: do this"


def test_invalid_request_is_what_the_runtime_calls_invalid_argument():
    assert issubclass(errors.InvalidRequestError, ValueError)
    assert not issubclass(errors.InvalidRequestError, errors.WorkerError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (None, "None"),
        (2.5, "2.5"),
        ("a\nb", r"'a\nb'"),
        ("x" * 10**7, repr("x" * 80)),
        (b"x" * 10**7, repr(b"x" * 80)),
        ([[1] * 10**6], "a list of length 1"),
        ({"a": 1, "b": 2}, "a dict of length 2"),
    ],
)
def test_a_value_of_a_request_is_shown_in_short(value, text):
    assert errors.shown(value) == text


class UnreadableError(Exception):
    def __str__(self):
        raise SystemExit(1)


@pytest.mark.parametrize(
    ("error", "description"),
    [
        (KeyError("a"), "KeyError: 'a'"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (UnreadableError(), "UnreadableError: its message cannot be read (SystemExit)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_can_be_described(error, description):
    assert errors.describe(error) == description
