"""The ports that deploy/kubernetes pins: the runtime reads their variables, so a NetworkPolicy can name them."""

from __future__ import annotations

import psutil

from dynamo_worker.testing import Cluster
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.sockets import listening


def test_requests_and_answers_take_the_ports_that_are_set(cluster: Cluster) -> None:
    requests, answers = free_port(), free_port()
    cluster.start_frontend(DYN_TCP_RESPONSE_STREAM_PORT=str(answers))
    worker = cluster.worker("--grace-period", "0", DYN_TCP_RPC_PORT=str(requests))
    cluster.wait_model()
    assert cluster.ask(8).ok
    # What is left is the runtime's own server, from which frontends read the model's files.
    other = {each.port for each in worker.listening()} - {worker.status_port}
    assert requests in other
    assert len(other) == 2
    frontend = [process.pid for process in psutil.process_iter() if "frontend" in " ".join(process.cmdline())]
    assert answers in {each.port for each in listening(frontend)}
    worker.stop()
