from __future__ import annotations

import pytest

from dynamo_worker.supervisor import text


@pytest.mark.parametrize("character", "\x00\x1b\r\x7f\x85\x9b\u061c\u200f\u2028\u2029\u202e\u2066\u2069")
def test_what_a_terminal_acts_on_is_escaped(character):
    for shown in (text.safe(f"a{character}b"), text.format_value(f"a{character}b"), text.continued(f"a{character}b")):
        assert character not in shown
        assert "\\" in shown


def test_other_characters_stay():
    assert text.safe("é…\t語\n\N{ZERO WIDTH JOINER}") == "é…\t語\n\N{ZERO WIDTH JOINER}"


def test_further_lines_are_indented():
    assert text.continued("one\r\ntwo\nthree") == "one\n    two\n    three"
    assert text.indented("one\ntwo") == "    one\n    two"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("nats://me:pw@host:4222", "nats://***@host:4222"),
        ("nats://token@host:4222: Connection refused", "nats://***@host:4222: Connection refused"),
        ("http://a:1, https://u:p%40@b:2", "http://a:1, https://***@b:2"),
        ("(me:pw@host:4222: Connection refused)", "(***@host:4222: Connection refused)"),
        ("ETCD_ENDPOINTS: 'u:p@h' is", "ETCD_ENDPOINTS: '***@h' is"),
        ("mail me@example.org", "mail me@example.org"),
        ("git+ssh://git@host/x@v1", "git+ssh://***@host/x@v1"),
        ('{"api_key": "x", "n": 1, "tokens": "y"}', '{"api_key": "***", "n": 1, "tokens": "y"}'),
        ("http://host:1/a@b", "http://host:1/a@b"),
    ],
)
def test_passwords(given, shown):
    assert text.redacted(given) == shown


@pytest.mark.parametrize("name", ["api_key", "hf_token", "token", "admin-api-key", "PASSWORD", "client_secret"])
def test_values_that_are_secrets(name):
    assert text.without_secrets(name, "x") == "***"
    assert text.without_secrets("outer", {name: ["x", None, 3]}) == {name: ["***", None, 3]}


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "keyboard", "kv_block_size"])
def test_values_that_are_none(name):
    assert text.without_secrets(name, "x") == "x"
