"""What runs under NVIDIA's vLLM worker runs here: upstream's launch scripts, recipes and manifests, flag for flag."""

from __future__ import annotations

import pytest
from upstream_commands import Command, commands

SCRIPTS = list(commands("vllm", "launch_scripts"))
DEPLOYMENTS = list(commands("vllm", "deployments"))


@pytest.mark.parametrize("command", [*SCRIPTS, *DEPLOYMENTS], ids=lambda command: command.name)
def test_accepted_or_refused_by_name(command: Command) -> None:
    assert not command.problem(command.refusals("vllm"))


def test_how_many_scripts() -> None:
    """The ratio that docs/migrating-vllm.md promises."""
    assert len([command for command in SCRIPTS if not command.refused]) >= 32
