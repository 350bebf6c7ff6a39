"""A rolling upgrade that changes the model card: each generation has a namespace of its own, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from dynamo_worker.testing import Cluster, Load, Worker
from dynamo_worker.testing.client import Result, chat

#: Workers of each generation.
WORKERS = 3


class Clients:
    """Sends short requests, several at a time, until it is stopped."""

    def __init__(self, cluster: Cluster) -> None:
        self.results: list[Result] = []
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            bodies = [chat("echo", f"The quick brown fox {number}.", 20) for number in range(4)]
            self.results += Load(self._cluster.url, bodies).wait()

    def stop(self) -> list[Result]:
        """Return the results of all requests."""
        self._stop.set()
        self._thread.join(60)
        return self.results


def generation(cluster: Cluster, suffix: str, template: Path) -> Worker:
    """Start a worker of one generation, whose model card has this chat template."""
    return cluster.start_worker(
        *("--drain", "complete", "--tokens-per-second", "50", "--custom-jinja-template", str(template)),
        DYN_NAMESPACE_WORKER_SUFFIX=suffix,
    )


def template(directory: Path, name: str) -> Path:
    """Write a chat template that differs from every other one."""
    path = directory / f"{name}.jinja"
    path.write_text(f"{{# {name} #}}{{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}")
    return path


def test_a_worker_that_frontends_ignore_says_so(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_frontend()
    first = generation(cluster, "one", template(tmp_path, "one")).wait_ready()
    cluster.wait_model()
    equal = generation(cluster, "one", template(tmp_path, "one")).wait_ready()
    cluster.wait_routed(equal)
    third = generation(cluster, "three", template(tmp_path, "three")).wait_ready()
    cluster.wait_routed(third)
    other = generation(cluster, "one", template(tmp_path, "two")).wait_ready()
    other.wait_log(r"Frontends may ignore this worker: .* model=echo differs=chat_template_file next=")
    assert all(cluster.ask(4).ok for _ in range(8))
    assert other.metric('dynamo_worker_requests_total{outcome="completed"}') == 0
    assert "Frontends may ignore" not in first.log + equal.log + third.log


def test_a_changed_chat_template_with_a_suffix_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_frontend()
    old = [generation(cluster, "one", template(tmp_path, "one")) for _ in range(WORKERS)]
    for worker in old:
        worker.wait_ready()
    cluster.wait_model()
    for worker in old:
        cluster.wait_routed(worker)
    long, clients = cluster.load(6, 300), Clients(cluster)
    for worker in old:
        new = generation(cluster, "two", template(tmp_path, "two")).wait_ready()
        cluster.wait_routed(new)
        worker.signal(signal.SIGTERM)
        assert worker.wait_gone() == 0
    results = [*clients.stop(), *long.wait()]
    lost = [result.error for result in results if not result.ok]
    print(f"{len(results)} requests, {len(lost)} lost")
    assert not lost
    assert len(results) > 50
