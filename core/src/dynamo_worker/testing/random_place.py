"""The environment of random rounds: a long-lived cluster with a second worker and a trickle of requests."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.cluster import Cluster

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing.cluster import Worker
    from dynamo_worker.testing.leftovers import Leftovers
    from dynamo_worker.testing.subject import Subject

#: Tokens per request of a trickle, and the pause between requests in seconds.
TRICKLE_TOKENS = 5
_TRICKLE_SECONDS = 0.15


@dataclass
class Place:
    """A cluster in which rounds run one after another, with a frontend and a worker that always serves."""

    cluster: Cluster
    subject: Subject
    spare: Worker
    #: Startup time of the spare worker, in seconds.
    start_seconds: float
    #: Shared-memory segments used by rounds in all places, with the markers of those rounds.
    segments: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, directory: Path, leftovers: Leftovers, subject: Subject) -> Place:
        """Start the frontend and the spare worker."""
        directory.mkdir()
        cluster = Cluster(directory, leftovers.tmp, leftovers.marker, engine_args=subject.args)
        cluster.model, cluster.start_seconds = subject.model, subject.start_seconds
        cluster.start_frontend()
        began = time.monotonic()
        spare = cluster.worker("--grace-period", "0")
        seconds = time.monotonic() - began
        cluster.wait_model()
        return cls(cluster, subject, spare, seconds)

    def close(self) -> None:
        """Stop the spare worker and the frontend.

        :raises AssertionError: the spare worker does not exit cleanly.
        """
        try:
            self.spare.stop()
        finally:
            self.cluster.close()


class Trickle(contextlib.AbstractContextManager["Trickle"]):
    """Sends short requests one after another during a ``with`` block."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.loads: list[Load] = []

    def _run(self) -> None:
        while not self._over.wait(_TRICKLE_SECONDS):
            self.loads.append(Load(self._cluster.url, [chat(self._cluster.model, "trickle", TRICKLE_TOKENS)]))

    def __enter__(self) -> Trickle:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
