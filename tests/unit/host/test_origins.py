"""Origins name a value the way its user wrote it."""

from __future__ import annotations

import pytest

from dynamo_worker.host.config.origins import DEFAULT, Origin


@pytest.mark.parametrize(
    ("origin", "text", "described"),
    [
        (Origin("flag", "--drain"), "flag --drain", "--drain abort"),
        (Origin("environment", "DYN_WORKER_DRAIN"), "environment DYN_WORKER_DRAIN", "DYN_WORKER_DRAIN=abort"),
        (Origin("file", "w.yaml"), "file w.yaml", "`drain: abort` in w.yaml"),
        (DEFAULT, "default", "--drain abort (the default)"),
    ],
)
def test_origins(origin, text, described):
    assert str(origin) == text
    assert origin.describe("drain", "abort") == described


def test_lists_are_words():
    assert Origin("flag", "--plugin").describe("plugin", ["a", "b"]) == "--plugin a b"
