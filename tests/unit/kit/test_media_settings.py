"""The limits of media: flags, variables, and what makes no sense together."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from dynamo_worker.errors import UsageError
from dynamo_worker.kit.media_addresses import AddressPolicy
from dynamo_worker.kit.media_settings import MediaSettings, add_flags, from_arguments

MIB = 2**20


def read(*words: str) -> MediaSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_arguments(parser.parse_args(words))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("DYN_MM_", "DYN_WORKER_MEDIA_")):
            monkeypatch.delenv(name)


def test_without_flags_the_defaults_count() -> None:
    assert read() == MediaSettings()


def test_every_flag_sets_its_field() -> None:
    words = "--media-max-items 3 --media-max-item-mib 2 --media-max-request-mib 4 --media-timeout 1.5 "
    words += "--media-connect-timeout 0.5 --media-max-redirects 0 --media-max-pixels 1000 --media-max-frames 9 "
    words += "--media-decode-timeout 2 --media-fetches 5 --media-decoders 6 --media-memory-mib 77 --media-cache-mib 0 "
    words += "--media-allow-host Images.example.com. --media-allow-host .cdn.example --media-allow-network 10.0.0.0/8 "
    words += "--media-allow-network fd00::/8 --media-allow-path /srv/images"
    assert read(*words.split()) == MediaSettings(
        *(3, 2 * MIB, 4 * MIB, 1.5, 0.5, 0, 1000, 9, 2.0, 5, 6, 77 * MIB, 0),
        ("images.example.com", ".cdn.example"),
        ("10.0.0.0/8", "fd00::/8"),
        ("/srv/images",),
    )


def test_every_flag_is_in_the_manual_with_its_default() -> None:
    page = (Path(__file__).parents[3] / "docs" / "requests.md").read_text()
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for action in parser._actions[1:]:
        assert action.help is not None
        default = action.help.rpartition("default: ")[2].removesuffix(")")
        assert f"| `{action.option_strings[0]}` | {default} | " in page


def test_variables_stand_in_for_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_WORKER_MEDIA_MAX_ITEM_MIB", "7")
    monkeypatch.setenv("DYN_WORKER_MEDIA_ALLOW_NETWORK", "10.0.0.0/8, 192.168.1.0/24")
    assert read().max_bytes == 7 * MIB
    assert read().networks == ("10.0.0.0/8", "192.168.1.0/24")
    assert read("--media-max-item-mib", "3").max_bytes == 3 * MIB


def test_the_variables_of_dynamos_own_workers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
    monkeypatch.setenv("DYN_MM_LOCAL_PATH", "/srv")
    monkeypatch.setenv("DYN_MM_MAX_FILE_SIZE_MB", "9")
    settings = read()
    assert (settings.networks, settings.paths, settings.max_bytes) == (("0.0.0.0/0", "::/0"), ("/srv",), 9 * MIB)
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "0")
    assert read().networks == ()


@pytest.mark.parametrize(
    "words",
    [
        "--media-max-items 0",
        "--media-max-items x",
        "--media-max-items 1.5",
        "--media-timeout nan",
        "--media-timeout inf",
        "--media-timeout -1",
        "--media-max-pixels 99999999999",
        "--media-cache-mib -1",
        "--media-allow-host http://x",
        "--media-allow-host *",
        "--media-allow-network 10.0.0.1/8",
        "--media-allow-network private",
        "--media-allow-path images",
    ],
)
def test_nonsense_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(*words.split())
    assert f"argument {words.split()[0]}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYN_WORKER_MEDIA_MAX_ITEMS", "many"),
        ("DYN_WORKER_MEDIA_ALLOW_NETWORK", "10.0.0.0/8,x"),
        ("DYN_MM_LOCAL_PATH", "images"),
        ("DYN_MM_MAX_FILE_SIZE_MB", "-3"),
    ],
)
def test_nonsense_in_a_variable_names_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{name}: expected"):
        read()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--media-max-item-mib 65", "--media-max-request-mib 64 is less than --media-max-item-mib 65"),
        ("--media-memory-mib 256", "--media-memory-mib 256: a quarter of it is for files"),
        ("--media-max-pixels 999999999", "--media-memory-mib 2048: three quarters of it are for decoded images"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(*words.split())


def test_an_allowed_network_opens_no_metadata_service_unless_named_alone() -> None:
    everywhere = AddressPolicy(["0.0.0.0/0", "::/0"])
    assert everywhere.refusal("127.0.0.1") is everywhere.refusal("::1") is everywhere.refusal("fe80::1%eth0") is None
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254"):
        assert everywhere.refusal(address) == "a metadata service"
    assert AddressPolicy(["169.254.169.254/32"]).refusal("169.254.169.254") is None
    assert AddressPolicy(["10.0.0.0/8"]).refusal("::ffff:10.1.2.3") is None
    assert AddressPolicy(["::ffff:0:0/96"]).refusal("::ffff:10.1.2.3") == "private"


def test_public_addresses_are_allowed() -> None:
    policy = AddressPolicy()
    for address in ("1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "172.32.0.1"):
        assert policy.refusal(address) is None, address
    assert policy.refusal("nonsense") == "no address"
