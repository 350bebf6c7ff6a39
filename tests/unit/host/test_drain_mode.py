"""What each mode of ``--drain`` means, in one table."""

from __future__ import annotations

import json

import pytest
import yaml

from dynamo_worker.host.config.drain_mode import Cut, DrainMode
from dynamo_worker.host.config.options import BY_NAME
from dynamo_worker.host.config.settings import WorkerSettings


@pytest.mark.parametrize(
    ("mode", "waits", "cut", "grace_period", "remainder"),
    [
        (DrainMode.COMPLETE, True, Cut.HANDOFF, 5, "handed off"),
        (DrainMode.HANDOFF, False, Cut.HANDOFF, 0, "handed off"),
        (DrainMode.ABORT, False, Cut.ABORT, 0, "aborted"),
    ],
)
def test_what_a_mode_means(mode, waits, cut, grace_period, remainder):
    assert (mode.waits, mode.cut, mode.default_grace_period, mode.remainder) == (waits, cut, grace_period, remainder)
    assert mode.remainder in mode.summary
    assert WorkerSettings(drain=mode.value).grace_period == grace_period


@pytest.mark.parametrize("mode", DrainMode)
def test_a_mode_is_read_and_printed_as_a_plain_word(mode):
    settings = WorkerSettings(drain=mode.value)
    assert settings.drain is mode
    assert str(mode) == f"{mode}" == mode.value
    dumped = settings.model_dump(mode="json")["drain"]
    assert type(dumped) is str
    assert yaml.safe_load(yaml.safe_dump({"drain": dumped})) == json.loads(settings.model_dump_json(include={"drain"}))


def test_the_default_and_the_choices_are_those_of_the_option():
    option = BY_NAME["drain"]
    assert WorkerSettings().drain is option.default is DrainMode.COMPLETE
    assert option.choices == ("complete", "handoff", "abort")
    assert option.shown_default == "complete"
