"""A worker that frontends ignore, because of its model card, with a real etcd."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.etcd_server import Etcd

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)"
)


def test_a_worker_that_frontends_ignore_says_so(cluster: Cluster, etcd: Etcd, tmp_path: Path) -> None:
    environment = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url}
    template = tmp_path / "other.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    first = cluster.worker(**environment)
    equal = cluster.worker(**environment)
    generation = cluster.worker(
        "--custom-jinja-template", str(template), DYN_NAMESPACE_WORKER_SUFFIX="two", **environment
    )
    other = cluster.worker("--custom-jinja-template", str(template), **environment)
    other.wait_log("Frontends may ignore this worker: .* model=echo differs=.*chat_template_file.* next=")
    for worker in (first, equal, generation, other):
        worker.stop()
        assert ("Frontends may ignore" in worker.log) == (worker is other)
