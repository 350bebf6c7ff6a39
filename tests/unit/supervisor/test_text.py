from __future__ import annotations

import time

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
        ("nats://worker:Pa;ss@nats:4222: refused", "nats://***@nats:4222: refused"),
        ("etcd://u:p@ss@h:2379, etcd://b:2379", "etcd://***@h:2379, etcd://b:2379"),
        ("nats://u:a'b@h", "nats://***@h"),
        ('http://root:p"w@h:2379', "http://***@h:2379"),
        ("nats://u:pa/ss@h", "nats://***@h"),
        ("tried=u:p@ss@h:1", "tried=***@h:1"),
        ("u:p;a'ss@h:1", "***@h:1"),
        ("me@corp:pw@host", "***@host"),
        ("u:p@a;nats://u:p@b", "***@a;nats://***@b"),
        ("file:///models/x@v1", "file:///models/x@v1"),
        ('{"api_key": "x", "n": 1, "tokens": "y"}', '{"api_key": "***", "n": 1, "tokens": "y"}'),
        (r'{"hf_token": "hf_a\"bc", "n": 1}', '{"hf_token": "***", "n": 1}'),
        (r"{'key': 'a\'bc'}", """{'key': "***"}"""),
        ('the answer: {"password": "abc', 'the answer: {"password": "***"'),
        # All up to the last "@" may be a password: rather too much than too little.
        ("http://host:1/a@b", "http://***@b"),
        ("git+ssh://git@host/x@v1", "git+ssh://***@v1"),
    ],
)
def test_passwords(given, shown):
    assert text.redacted(given) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("x" * 30, "x" * 20 + "…"),
        ("reason: nats://u:secret@host", "reason: nats://***…"),
        ("reason:_nats://host:4222/path", "reason:_nats://host:…"),
        ("reason: me:secret, long and me@b", "reason: me:secret, l…"),
        ('{"api_key": "secretsecret"}', '{"api_key": "***"…'),
    ],
)
def test_what_is_cut_off_is_no_password(given, shown):
    assert text.redacted(given, 20) == shown


@pytest.mark.parametrize(
    "given",
    ["m nats://u:ÄÖ@ÜÄ;/ÖÜ@h:4222, x", "m (u:ÄÖ@Ü'Ä/ÖÜ@h, x", '{"a": 1, "key": "ÄÖ\\"Ü@\\\\Ä", "b": 2}', "nats://ÄÖ@h"],
)
def test_wherever_a_text_is_cut_no_part_of_a_password_is_left(given):
    for most in range(len(given) + 1):
        assert not set("ÄÖÜ") & set(text.redacted(given, most)), most


@pytest.mark.parametrize(
    "part",
    [
        "(a:",
        "a.",
        "a",
        "=",
        "://",
        "a://",
        "@",
        "a:@",
        "a@ ",
        '"',
        '"_',
        '"key',
        '"key"',
        '"key" ',
        '"key":"\\"',
        "'key':'",
    ],
)
@pytest.mark.parametrize("end", [" @", "@", ":@", "", '"'])
def test_the_time_grows_with_the_length_and_not_with_its_square(part, end):
    def seconds(size: int) -> float:
        given = part * (size // len(part)) + end
        since = time.process_time()
        text.redacted(given)
        return time.process_time() - since

    # 64 times the length; its square would be 4096 times the time. What is too short to be measured is given a length.
    assert seconds(1 << 20) < 512 * max(min(seconds(1 << 14) for _ in range(3)), 1e-3)


@pytest.mark.parametrize("name", ["api_key", "hf_token", "token", "admin-api-key", "PASSWORD", "client_secret"])
def test_values_that_are_secrets(name):
    assert text.without_secrets(name, "x") == "***"
    assert text.without_secrets("outer", {name: ["x", None, 3]}) == {name: ["***", None, 3]}
    assert text.format_value("x", name) == "***"
    assert text.format_value({name: ["x"]}) == f"\"{{'{name}': ['***']}}\""


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "keyboard", "kv_block_size"])
def test_values_that_are_none(name):
    assert text.without_secrets(name, "x") == "x"
