"""What the tests of all engine plugins need: the kit, as any plugin's author uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["dynamo_worker.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Let engines and torch warn: what they deprecate is not ours to mend."""
    config.addinivalue_line("filterwarnings", "default")
