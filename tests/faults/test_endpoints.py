"""A second endpoint of the same engine, called without a frontend through the runtime's own client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from .conftest import FaultyCluster

CLIENT = """
import array, asyncio, json, os, sys
from dynamo.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint(f"dynamo.backend.{sys.argv[1]}").client()
    await client.wait_for_instances()
    request = json.loads(sys.argv[2])
    if "packed" in request:
        request["token_ids"] = array.array("i", request.pop("packed")).tobytes()
    tokens = []
    try:
        async for chunk in await client.round_robin(request):
            tokens += (chunk.data() or {}).get("token_ids", [])
            print("token", flush=True)
        print(json.dumps({"tokens": tokens}), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    os._exit(0)

asyncio.run(main())
"""


def call(faulty: FaultyCluster, endpoint: str, request: dict[str, object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, endpoint, json.dumps(request)],
        env=faulty.cluster.environment(DYN_LOG="error"),
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(client: subprocess.Popen[str]) -> dict[str, object]:
    output, _ = client.communicate(timeout=30)
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.parametrize("endpoint", ["generate", "side"])
@pytest.mark.parametrize("tokens", ["token_ids", "packed"])
def test_both_endpoints_answer(faulty: FaultyCluster, endpoint: str, tokens: str) -> None:
    faulty.serving()
    request = {tokens: [70, 71, 0], "stop_conditions": {"max_tokens": 4}}
    assert answer(call(faulty, endpoint, request)) == {"tokens": [70, 71, 70, 71]}


#: Wrong in itself, and beyond the engine's vocabulary.
MALFORMED = [
    *({"token_ids": "text"}, {"token_ids": [1.5]}, {"token_ids": [70, True]}, {"packed": []}, {}),
    *({"token_ids": [70, -1]}, {"packed": [70, -1]}, {"token_ids": [70, 259]}, {"packed": [70, 259]}),
]


def test_a_malformed_request_gets_its_typed_error(faulty: FaultyCluster) -> None:
    worker = faulty.serving()
    clients = [call(faulty, "generate", request) for request in MALFORMED]
    for client, request in zip(clients, MALFORMED, strict=True):
        assert "InvalidArgument: token_ids: " in str(answer(client)["error"]), request
    assert faulty.cluster.ask().ok
    assert worker.running


def test_an_endpoint_that_is_not_graceful_is_cut_when_the_drain_starts(faulty: FaultyCluster) -> None:
    worker = faulty.serving("--tokens-per-second", "20")
    load = faulty.cluster.load(2, 60)
    client = call(faulty, "side", {"token_ids": [70, 0], "stop_conditions": {"max_tokens": 400}})
    assert client.stdout is not None
    assert client.stdout.readline() == "token\n"
    worker.signal(signal.SIGTERM)
    assert "handed off" in str(answer(client)["error"])
    assert all(result.ok for result in load.wait()), load.summary()
    assert worker.wait_gone() == 0
