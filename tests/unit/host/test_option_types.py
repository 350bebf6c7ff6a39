"""One option: the check of its values, and its help text."""

from __future__ import annotations

import pytest

from dynamo_worker.host.config.option_types import Number, Option


@pytest.mark.parametrize(("value", "number"), [("1.5", 1.5), (3, 3.0), ("1e1", 10.0), (" 7 ", 7.0)])
def test_numbers(value, number):
    assert Number(1, 10, "seconds").parse(value) == number


@pytest.mark.parametrize("value", ["-1", "0", "11", "nan", "inf", "ten", "", "1" * 5000, 10**400])
def test_other_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"^expected a number of seconds between 1 and 10$"):
        Number(1, 10, "seconds").parse(value)


@pytest.mark.parametrize(
    ("value", "kind"), [(True, "a boolean"), ([1], "a list"), ({}, "a mapping"), (None, "nothing"), (1j, "a complex")]
)
def test_other_types_are_named(value, kind):
    with pytest.raises(ValueError, match=f"^expected an integer between 0 and 5, got {kind}$"):
        Number(0, 5).parse(value)


def test_integers():
    assert Number(0, 5).parse("5") == 5
    assert isinstance(Number(0, 5).parse("5"), int)
    assert Number(0, 2**32 - 1).parse("4294967295") == 2**32 - 1
    with pytest.raises(ValueError, match="expected an integer"):
        Number(0, 5).parse("2.5")


def test_zero_can_mean_never():
    assert Number(1, 10, "seconds", never=True).parse("0") == 0
    with pytest.raises(ValueError, match="between 1 and 10, or 0 for never"):
        Number(1, 10, "seconds", never=True).parse("0.5")


def test_choices():
    option = Option("mode", "Engine", "A mode.", choices=("fast", "slow"))
    assert option.parse("FAST") == "fast"
    assert option.parse(None) is None
    with pytest.raises(ValueError, match=r"^expected one of fast, slow, did you mean slow\?$"):
        option.parse("slwo")
    with pytest.raises(ValueError, match=r"^expected one of fast, slow$"):
        option.parse(3)


def test_other_values_pass():
    assert Option("path", "Engine", "A path.").parse("/x") == "/x"


def test_summary():
    assert Option("mode", "Engine", "A mode.", "MODE").summary == "A mode. [default: none] [env:\N{NO-BREAK SPACE}MODE]"
    assert Option("mode", "Engine", "A mode.", default=2.0).summary == "A mode. [default: 2]"
