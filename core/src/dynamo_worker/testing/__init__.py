"""Test kit: real workers, a real frontend, real clients and faults; for this project and for plugin authors.

Install it with ``pip install dynamo-worker[testing]`` and name it in ``conftest.py``::

    pytest_plugins = ["dynamo_worker.testing.plugin"]

It gives the fixtures ``cluster`` (private discovery, a frontend, workers) and ``no_leftovers`` (fails a test that
leaves a process, a shared-memory segment or a file behind).
:class:`dynamo_worker.testing.conformance.EngineConformance` holds the tests every engine plugin should pass.
"""

from __future__ import annotations

from dynamo_worker.testing.client import Load, Result
from dynamo_worker.testing.cluster import Cluster, Worker
from dynamo_worker.testing.leftovers import Leftovers
from dynamo_worker.testing.waiting import eventually

__all__ = ["Cluster", "Leftovers", "Load", "Result", "Worker", "eventually"]
