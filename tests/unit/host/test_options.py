"""The table of all settings, from which `--help` and the documentation are made."""

from __future__ import annotations

import re

from dynamo_worker.host.config.option_types import GROUPS
from dynamo_worker.host.config.options import FRONTEND_OPTIONS, OPTIONS, markdown_table


def test_names_are_unique():
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    assert len({option.env for option in OPTIONS}) == len(OPTIONS)
    flags = [flag for option in OPTIONS for flag in option.flags]
    assert len(set(flags)) == len(flags)


def test_every_option_says_what_it_does():
    for option in OPTIONS:
        assert option.group in GROUPS
        assert option.help.endswith(".")
        assert option.kind == "switch" or option.placeholder, option.name
        assert option.shown_default


def test_options_stand_under_their_heading():
    groups = [option.group for option in OPTIONS]
    assert groups == sorted(groups, key=GROUPS.index)


def test_flags():
    by_name = {option.name: option for option in OPTIONS}
    assert by_name["warmup"].flags == ("--warmup", "--no-warmup")
    assert by_name["plugin"].flags == ("-p", "--plugin")
    assert by_name["drain"].placeholder == "{complete,handoff,abort}"
    assert by_name["termination_grace_period"].shown_default == "30"


def test_markdown_has_a_row_for_every_option():
    table = markdown_table()
    for option in OPTIONS:
        (line,) = [line for line in table.splitlines() if f"| `{option.name}` |" in line]
        assert option.flag in line
        assert option.env in line
        assert len(re.findall(r"(?<!\\)\|", line)) == 6


def test_the_frontend_command_shares_names_and_limits_with_the_worker():
    by_name = {option.name: option for option in OPTIONS}
    for option in FRONTEND_OPTIONS:
        if option.name != "http":
            worker = by_name[option.name]
            assert (option.env, option.choices, option.number) == (worker.env, worker.choices, worker.number)


def test_defaults_are_accepted_values():
    for option in (*OPTIONS, *FRONTEND_OPTIONS):
        if option.default is not None:
            assert option.parse(option.default) == option.default, option.name
