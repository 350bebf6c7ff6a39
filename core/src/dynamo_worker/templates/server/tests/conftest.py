"""The test kit of dynamo-worker: real workers, a real frontend, and a check for leftovers after every test."""

from __future__ import annotations

import pytest

from dynamo_worker.testing import Subject

pytest_plugins = ["dynamo_worker.testing.plugin"]


@pytest.fixture
def subject() -> Subject:
    # Streams must take some seconds.
    return Subject(
        "acme",
        ["--tokens-per-second", "11"],
        model="acme",
        processes={"server": r"dynamo_worker_acme\.toy_server"},
        stream_tokens=45,
        expected=lambda prompt, tokens: (prompt.upper() * tokens)[:tokens],
        migrates=False,  # frontends continue no answer that is text
    )
