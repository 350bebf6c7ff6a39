"""Flags, files and JSON for an engine whose arguments are the fields of a pydantic model."""

from __future__ import annotations

import argparse
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from dynamo_worker import StartError
from dynamo_worker.kit import model_arguments


class Color(str, Enum):
    RED = "red"
    BLUE = "blue"


class Cache(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fraction: float = 0.9
    reuse: bool | Literal["all"] = True


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | Path = Field(default="m", description="The model,\n  100% of it.")
    size: PositiveInt | None = 4
    mode: Literal["auto", "slow"] | None = None
    color: Color = Color.RED
    share: bool = False
    cache: Cache = Field(default_factory=Cache)

    @model_validator(mode="after")
    def check(self) -> Arguments:
        if self.size == 13:
            raise ValueError("13 is not possible")
        if self.size == 14:
            raise RuntimeError("no device")
        return self


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", {"metavar": "TEXT", "help": "The model, 100%% of it. (default: m)"}),
        ("size", {"type": model_arguments.value, "metavar": "NUMBER", "help": " (default: 4)"}),
        ("mode", {"choices": ["auto", "slow"], "help": ""}),
        ("cache", {"type": model_arguments.value, "metavar": "JSON", "help": ""}),
    ],
)
def test_the_options_of_a_flag(name: str, expected: dict[str, Any]) -> None:
    assert model_arguments.options(Arguments.model_fields[name]) == expected


def test_an_enumeration_is_a_choice_and_a_switch_may_have_a_value() -> None:
    parser = argparse.ArgumentParser()
    for name in ("color", "share"):
        parser.add_argument(f"--{name}", **model_arguments.options(Arguments.model_fields[name]))
    assert parser.parse_args(["--color", "blue", "--share"]) == argparse.Namespace(color="blue", share=True)
    assert parser.parse_args(["--share", "false"]).share is False
    assert "(default: red)" in parser.format_help()


def test_what_is_neither_json_nor_yaml() -> None:
    for text in ("{", "a: b: c", "[" * 10_000):
        with pytest.raises(argparse.ArgumentTypeError, match="expected JSON or YAML, got '"):
            model_arguments.value(text)
    with pytest.raises(argparse.ArgumentTypeError, match="expected an object, got 3"):
        model_arguments.mapping("3")


def test_objects_are_merged_at_every_depth_and_stay_as_they_are() -> None:
    below, above = {"a": {"b": {"c": 1, "d": 2}}, "e": {"f": 1}}, {"a": {"b": {"c": 3}}, "e": None}
    assert model_arguments.merged(below, above) == {"a": {"b": {"c": 3, "d": 2}}, "e": None}
    assert below == {"a": {"b": {"c": 1, "d": 2}}, "e": {"f": 1}}
    alone = model_arguments.merged(below)
    alone["e"]["f"] = 2
    assert below["e"] == {"f": 1}


def validate(**sources: dict[str, Any]) -> None:
    model_arguments.validate(Arguments, sources, model_arguments.merged(*sources.values()))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"flags": {"size": "x"}}, "flags: size: expected a valid integer, .*, got 'x'"),
        ({"flags": {"size": 1}, "file": {"size": 0}}, "file: size: expected greater than 0, got 0"),
        ({"flags": {"cache": {"frac": 1}}, "file": {"cache": {}}}, "flags: unknown argument cache.frac"),
        ({"file": {"cache": {"fractoin": 1}}}, "file: unknown argument cache.fractoin, did you mean fraction?"),
        ({"file": {"cache": {"reuse": "some"}}}, "file: cache.reuse.bool: expected a valid boolean"),
        ({"flags": {"size": 13}}, "Value error, 13 is not possible$"),
        ({"flags": {"size": 14}}, "the engine rejects its arguments: RuntimeError: no device"),
    ],
)
def test_what_the_model_rejects(sources: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(StartError, match=message):
        validate(**sources)


def test_what_the_model_accepts() -> None:
    validate(flags={"size": 2, "cache": {"fraction": 0.5}}, file={"cache": {"reuse": "all"}})


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "arguments.yaml"
    path.write_text("size: 2\ncache: {fraction: 0.5}\n")
    assert model_arguments.read_file("--file", str(path)) == {"size": 2, "cache": {"fraction": 0.5}}
    path.write_text("")
    assert model_arguments.read_file("--file", str(path)) == {}
    path.write_bytes(b"\xff")
    with pytest.raises(StartError, match=f"--file {path}: .*utf-8"):
        model_arguments.read_file("--file", str(path))
    with pytest.raises(StartError, match="--file /dev/zero: expected at most 1048576 characters"):
        model_arguments.read_file("--file", "/dev/zero")
    with pytest.raises(StartError, match=f"--file {tmp_path}: .*directory"):
        model_arguments.read_file("--file", str(tmp_path))


LINE = model_arguments.CommandLine(
    Arguments,
    "DYN_TOY_",
    file=("file", "a file"),
    objects={"overrides": "an object", "more": "another"},
    parts={"fraction": ("cache", "fraction")},
    aliases={"size": ["--length"]},
    no_flags=("color",),
    required={"model": "--model NAME"},
    without_effect={("share",): "nobody is there"},
    supported={"mode": (("auto", None), "it takes for ever")},
)


def read(*words: str, **defaults: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    LINE.add_sources(parser.add_argument_group())
    LINE.add_arguments(parser.add_argument_group())
    return LINE.read(parser.parse_args(words), defaults)


def test_where_arguments_come_from_and_which_take_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arguments.yaml"
    path.write_text("size: 2\ncache: {fraction: 0.2}\n")
    assert read("--model", "m") == {"model": "m"}
    assert read("--model", "m", "--length", "3", size=1, mode="auto") == {"model": "m", "size": 3, "mode": "auto"}
    words = ["--model", "m", "--size", "1", "--fraction", "0.1", "--cache", "{reuse: false}", "--file", str(path)]
    assert read(*words) == {"model": "m", "size": 2, "cache": {"fraction": 0.2, "reuse": False}}
    words += ["--overrides", "{cache: {fraction: 0.3}, size: 3}", "--more", "{size: 4}"]
    assert read(*words) == {"model": "m", "size": 4, "cache": {"fraction": 0.3, "reuse": False}}
    monkeypatch.setenv("DYN_TOY_SIZE", "7")
    monkeypatch.setenv("DYN_TOY_MORE", "{share: false}")
    assert read("--model", "m") == {"model": "m", "size": 7, "share": False}
    assert read("--model", "m", "--size", "8")["size"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the model is missing\n  next: --model NAME"),
        (["--model", "m", "--share"], "--share has no effect in a worker: nobody is there"),
        (["--model", "m", "--mode", "slow"], "mode = 'slow' is not supported: it takes for ever"),
        (["--model", "m", "--more", "{sise: 1}"], "--more: unknown argument sise, did you mean size"),
        (["--model", "m", "--fraction", "x"], "the command line: cache.fraction: expected a valid number"),
    ],
)
def test_arguments_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(StartError, match=message):
        read(*words)


def test_an_argument_that_no_text_can_state_has_no_flag() -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        read("--model", "m", "--color", "red")
