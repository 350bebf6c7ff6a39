"""What the flags say, and what they must not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.errors import UsageError
from dynamo_worker_server import arguments
from dynamo_worker_server.arguments import Address, Settings

if TYPE_CHECKING:
    from pathlib import Path


def read(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    return Settings.of(parser.parse_args(words))


def test_the_command_is_taken_as_it_is() -> None:
    command = ["vllm", "serve", "m", "--port", "{port}", "--attach", "x", "--", "--served-model-name", "y"]
    settings = read("--served-model-name", "a,b", "--", *command)
    assert settings.command == tuple(command)
    assert settings.attach is None
    assert settings.names == ("a", "b")
    assert read("--server-command", "a 'b c' --x {port}").command == ("a", "b c", "--x", "{port}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a COMMAND or --attach"),
        (["--server-command", "'a {port}"], "No closing quotation"),
        (["--server-command", "a {port}", "--", "b"], "given twice"),
        (["--"], "needs a COMMAND or --attach"),
        (["--", "llama-server"], "no {port}"),
        (["--attach", "http://h:1", "--", "llama-server"], "expected no COMMAND"),
        (["--attach", "http://h:1", "--server-port", "5"], "--server-port is for a COMMAND"),
        (["--attach", "h:1"], "expected http://HOST:PORT"),
        (["--attach", "ftp://h"], "expected http://HOST:PORT"),
        (["--attach", "http://"], "expected http://HOST:PORT"),
        (["--attach", "http://h:99999"], "Port out of range"),
        (["--attach", "http://h:0"], "expected http://HOST:PORT"),
        (["--attach", "http://h/?a=b"], "expected http://HOST:PORT"),
        (["--attach", "http://h/a b"], "expected a path"),
        (["--attach", "http://user:secret@h"], "holds a password"),
    ],
)
def test_wrong_flags(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(*words)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected", "text"),
    [
        ("http://h:80", Address("h", 80), "http://h"),
        ("http://h:8000/", Address("h", 8000), "http://h:8000"),
        ("http://h:8000/v1", Address("h", 8000), "http://h:8000"),
        ("https://api.example.com/openai/v1/", Address("api.example.com", 443, True, "/openai"), None),
        ("http://[::1]:8000", Address("::1", 8000), "http://[::1]:8000"),
    ],
)
def test_addresses(url: str, expected: Address, text: str | None) -> None:
    assert Address.of(url) == expected
    assert text is None or str(expected) == text


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = ("--attach", "https://h")
    assert read(*attach).token() is None
    monkeypatch.setenv("KEY", "sk-1\n")
    assert read(*attach, "--server-token-env", "KEY").token() == "sk-1"
    file = tmp_path / "key"
    file.write_text("sk-2\n")
    settings = read(*attach, "--server-token-file", str(file))
    assert settings.token() == "sk-2"
    for wrong in ("", "two words", "a\x00b", "ü", "x" * 20_000, "a\r\nX-Evil: 1"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(UsageError) as caught:
            settings.token()
        assert len(str(caught.value)) < 300
        assert not wrong.strip() or wrong.strip() not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        read(*attach, "--server-token-file", str(tmp_path / "none")).token()
    with pytest.raises(UsageError, match="NOKEY"):
        read(*attach, "--server-token-env", "NOKEY").token()
