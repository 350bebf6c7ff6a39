"""The YAML configuration file: reading it, and rejecting errors with their line."""

from __future__ import annotations

import pytest

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.config_file import read_config


def write(tmp_path, text):
    path = tmp_path / "w.yaml"
    path.write_text(text)
    return path


def test_settings_and_engine_flags(tmp_path):
    file = read_config(write(tmp_path, "drain: handoff\nengine_args: [--size, 2]\n"))
    assert file.path == tmp_path / "w.yaml"
    assert file.values == {"drain": "handoff"}
    assert file.engine_args == ["--size", 2]


def test_empty_file(tmp_path):
    assert read_config(write(tmp_path, "# nothing\n")).values == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drain: [", r"w\.yaml, line 1, column \d+ is not valid YAML"),
        ("- a\n- b\n", "expected `key: value` pairs, got a list"),
        ("grace-period: 3\n", r"unknown key 'grace-period', did you mean grace_period\?"),
        ("1: 3\n", "unknown key 1"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("engine_args: --size 2\n", "engine_args: expected a mapping"),
        (
            "drain: abort\nengine: echo\ndrain: handoff\n",
            r"w\.yaml, line 3, .*duplicate key 'drain', first given in line 1",
        ),
        ("engine_args: {size: 1, size: 2}\n", r"line 1, .*duplicate key 'size', first given in line 1"),
        ("engine_args:\n  a: {b: 1}\n  a:\n    b: 2\n", r"line 3, .*duplicate key 'a', first given in line 2"),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read_config(write(tmp_path, text))


def test_keys_may_repeat_in_other_mappings_and_in_merges(tmp_path):
    text = "engine_args:\n  outer: {inner: &b {<<: &a {size: 1, rate: 2}, size: 3}}\n  other: {<<: [*a, *b], size: 4}\n"
    assert read_config(write(tmp_path, text)).engine_args == {
        "outer": {"inner": {"size": 3, "rate": 2}},
        "other": {"size": 4, "rate": 2},
    }


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the configuration file .*: No such file or directory"):
        read_config(tmp_path / "none.yaml")


def test_binary_file(tmp_path):
    (tmp_path / "w.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not valid UTF-8"):
        read_config(tmp_path / "w.yaml")
