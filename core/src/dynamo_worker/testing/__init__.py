"""Test kit: real workers, a real frontend, real clients and faults; for this project and for plugin authors.

Install it with ``pip install dynamo-worker[testing]`` name it in ``conftest.py``, and say there what is
tested::

    pytest_plugins = ["dynamo_worker.testing.plugin"]

    @pytest.fixture
    def subject():
        return Subject("myengine", model="mymodel")

Its fixtures are ``cluster`` (private discovery, a frontend, workers of the subject), ``no_leftovers`` (fails a test
that leaves a process, a shared-memory segment or a file behind) and ``tiny_model``.
:class:`~dynamo_worker.testing.conformance.EngineConformance`, :class:`~dynamo_worker.testing.fault_table.FaultTable`,
:class:`~dynamo_worker.testing.serving.Serving` and :class:`~dynamo_worker.testing.translation.Translation` hold the
tests every engine plugin should pass.
"""

from __future__ import annotations

from dynamo_worker.testing.client import Load, Result
from dynamo_worker.testing.cluster import Cluster, Worker
from dynamo_worker.testing.leftovers import Leftovers
from dynamo_worker.testing.subject import Subject
from dynamo_worker.testing.waiting import eventually

__all__ = ["Cluster", "Leftovers", "Load", "Result", "Subject", "Worker", "eventually"]
