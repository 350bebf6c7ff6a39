"""The messages by which a round is judged are those that the worker logs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dynamo_worker
from dynamo_worker.testing.random_draws import STAGES
from dynamo_worker.testing.random_round import GUARDIAN_TROUBLE, TROUBLE

CORE = Path(dynamo_worker.__file__).parent


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All strings in the core's code, except docstrings and those of the test kit."""
    found = []
    for path in CORE.rglob("*.py"):
        if not path.is_relative_to(CORE / "testing"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found += [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
            ]
    return found


MESSAGES = [*TROUBLE, *GUARDIAN_TROUBLE, *(message for pattern in STAGES.values() for message in pattern.split("|"))]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_looked_for_exists(texts: list[str], message: str) -> None:
    assert any(message in text for text in texts)
