"""Fixtures of all tests: the kit that plugin authors use too."""

from __future__ import annotations

import pytest
from hypothesis import settings

from dynamo_worker.testing import Subject

# An example that takes long on a busy machine is no failure; the tests have a time limit of their own.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

pytest_plugins = ["dynamo_worker.testing.plugin"]


@pytest.fixture
def subject() -> Subject:
    return Subject("echo")
