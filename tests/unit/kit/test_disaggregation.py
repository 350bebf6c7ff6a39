"""What prefill and decode workers are to routers."""

from __future__ import annotations

import pytest

from dynamo_worker.kit.disaggregation import Role


@pytest.mark.parametrize(
    ("mode", "needs", "types"),
    [
        ("aggregated", (), ("chat", "completions")),
        ("prefill", (("decode",),), ("prefill",)),
        ("decode", (("prefill",),), ("chat", "completions")),
    ],
)
def test_roles(mode, needs, types):
    role = Role(mode)
    assert (role.mode, role.needs, role.endpoint_types) == (mode, needs, types)


@pytest.mark.parametrize(
    ("annotations", "bypasses"),
    [
        (None, False),
        ([], False),
        (["other"], False),
        (["other", "bypass-remote-prefill"], True),
        (["x-bypass-remote-prefill"], True),
        ([["x-bypass-remote-prefill"], {}, "x-bypass-remote-prefill"], True),
        ([[1], {"a": 1}, None], False),
        ("x-bypass-remote-prefill", False),
        (3, False),
    ],
)
def test_a_decode_worker_may_have_to_prefill(annotations, bypasses):
    assert Role("decode").bypasses_prefill({"annotations": annotations}) is bypasses
    assert not Role("decode").bypasses_prefill({})
