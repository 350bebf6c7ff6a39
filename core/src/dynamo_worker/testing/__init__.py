"""Test kit with real workers, frontends and clients, and injected faults; for this project and for plugin authors.

Install it with ``pip install 'dynamo-worker[testing]'``. In ``conftest.py``, load its pytest plugin and describe the
engine under test::

    pytest_plugins = ["dynamo_worker.testing.plugin"]

    @pytest.fixture
    def subject():
        return Subject("myengine", model="mymodel")

Its fixtures are ``cluster`` (private discovery, a frontend and workers of the subject), ``no_leftovers`` (fails a test
that leaves a process, a shared-memory segment or a file behind) and ``tiny_model``.
:class:`~dynamo_worker.testing.conformance.EngineConformance`, :class:`~dynamo_worker.testing.fault_table.FaultTable`,
:class:`~dynamo_worker.testing.serving.Serving` and :class:`~dynamo_worker.testing.translation.Translation` contain the
tests that every engine plugin should pass.
"""

from __future__ import annotations

from dynamo_worker.testing.client import Load, Result
from dynamo_worker.testing.cluster import Cluster, Worker
from dynamo_worker.testing.leftovers import Leftovers
from dynamo_worker.testing.subject import Subject
from dynamo_worker.testing.waiting import eventually

__all__ = ["Cluster", "Leftovers", "Load", "Result", "Subject", "Worker", "eventually"]
