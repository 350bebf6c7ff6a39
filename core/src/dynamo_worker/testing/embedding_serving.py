"""What every engine that makes embeddings has to show: whole workers behind the real frontend, and their faults.

A plugin's tests derive from :class:`EmbeddingServing` and say how to use the engine without a worker::

    class TestEmbeddings(EmbeddingServing):
        DIRECT = Path(__file__).parent / "direct_embeddings.py"

The subject has to make Matryoshka embeddings, of a model whose vocabulary has fewer than 100 000 tokens.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from dynamo_worker.testing.cluster import post
from dynamo_worker.testing.leftovers import SHARED_MEMORY, mapped_by_others, shared_memory
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_worker.testing.cluster import Cluster, Worker
    from dynamo_worker.testing.subject import Subject

    #: A text, or token ids.
    Input = str | list[int]

#: What is embedded: short and long texts, other alphabets, tokens.
INPUTS: Final[Sequence[Input]] = (
    "The quick brown fox jumps over the lazy dog.",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "¿Qué? 漢字, Ελληνικά \N{SNOWMAN}",
    [5, 6, 7, 8, 9] * 11,
    [3],
)
#: A shorter vector that clients ask for.
SHORT: Final = 8
#: Seconds for the engine to start without a worker and to embed the inputs.
_DIRECT_SECONDS: Final = 600.0


class EmbeddingLoad:
    """Requests for embeddings of many inputs each, all at once, in threads of the test."""

    def __init__(self, cluster: Cluster, requests: int = 12, inputs: int = 96, tokens: int = 400) -> None:
        """Send the requests."""
        self.inputs = inputs
        #: For each request its HTTP status and the decoded answer, or status 0 and an error.
        self.results: list[tuple[int, Any]] = []
        self._requests = requests
        self._threads = [
            threading.Thread(target=self._ask, args=(cluster, number, tokens), daemon=True)
            for number in range(requests)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, cluster: Cluster, number: int, tokens: int) -> None:
        batch = [[3 + (number + one) % 200] * tokens for one in range(self.inputs)]
        try:
            self.results.append(post(f"{cluster.url}/v1/embeddings", {"model": cluster.model, "input": batch}))
        except (OSError, ValueError) as error:
            self.results.append((0, error))

    @property
    def over(self) -> bool:
        """Whether every request is answered."""
        return len(self.results) == self._requests

    def wait(self, timeout: float = 120.0) -> list[tuple[int, Any]]:
        """Wait for all answers, and return them.

        :param timeout: for each of them, in seconds.
        :raises AssertionError: one takes longer.
        """
        for thread in self._threads:
            thread.join(timeout)
        assert self.over, f"{len(self.results)} of {self._requests} requests are answered"
        return self.results


class EmbeddingServing:
    """The tests."""

    #: A program that reads ``[[input, dimensions or null], …]`` as JSON, embeds each input by itself with the engine
    #: alone, and writes the vectors as its last line: JSON, little-endian floats in base64. Its argument is the model.
    DIRECT: ClassVar[Path]

    def direct(self, model: Path, cases: Sequence[tuple[Input, int | None]]) -> list[str]:
        """Return what the engine makes of inputs without a worker, and remove what it leaves in shared memory."""
        before = shared_memory()
        done = subprocess.run(
            [sys.executable, str(self.DIRECT), str(model)],
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            timeout=_DIRECT_SECONDS,
            check=False,
        )
        left = shared_memory() - before
        for name in left - mapped_by_others(left, "of a process that has ended"):
            Path(SHARED_MEMORY, name).unlink(missing_ok=True)
        assert done.returncode == 0, done.stderr[-4000:]
        vectors: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
        return vectors

    @staticmethod
    def embed(cluster: Cluster, given: Any, **fields: Any) -> tuple[int, Any]:
        """Ask for embeddings; return the HTTP status and the decoded answer."""
        return post(f"{cluster.url}/v1/embeddings", {"model": cluster.model, "input": given, **fields})

    def embedded(self, cluster: Cluster, given: Any, **fields: Any) -> list[Any]:
        """Return the embeddings of an answer with HTTP status 200."""
        status, body = self.embed(cluster, given, **fields)
        assert status == 200, body
        assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
        assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
        return [one["embedding"] for one in body["data"]]

    def refused(self, cluster: Cluster, message: str, given: Any, **fields: Any) -> None:
        """Check that a request is refused with a message."""
        status, body = self.embed(cluster, given, **fields)
        assert status == 400, body
        assert re.search(message, json.dumps(body, ensure_ascii=False)), body

    def test_serving(self, cluster: Cluster, tiny_model: Path) -> None:
        """Vectors are those of the engine alone; bad requests harm nothing; a stop waits for batches in flight."""
        cases: list[tuple[Input, int | None]] = [(one, size) for one in INPUTS for size in (None, SHORT)]
        expected = dict(zip(map(repr, cases), self.direct(tiny_model, cases), strict=True))
        (worker,) = cluster.serve(1, "--grace-period", "1")

        for one, size in cases:
            fields = {} if size is None else {"dimensions": size}
            (vector,) = self.embedded(cluster, one, encoding_format="base64", **fields)
            assert vector == expected[repr((one, size))], (one, size)
            (numbers,) = self.embedded(cluster, one, **fields)
            assert base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() == vector
        texts = [one for one in INPUTS if isinstance(one, str)]
        batch = self.embedded(cluster, texts, encoding_format="base64")
        assert batch == [expected[repr((one, None))] for one in texts]
        tokens = [one for one in INPUTS if isinstance(one, list)]
        batch = self.embedded(cluster, tokens * 40, encoding_format="base64")
        assert batch == [expected[repr((one, None))] for one in tokens] * 40

        self.check_refusals(cluster)
        assert self.embedded(cluster, texts, encoding_format="base64") == [expected[repr((one, None))] for one in texts]

        load = self.busy(cluster, worker)
        worker.signal(signal.SIGTERM)
        assert worker.wait_gone() == 0, worker.log
        for status, body in load.wait():
            assert status == 200, body
            assert len(body["data"]) == load.inputs

    def check_refusals(self, cluster: Cluster) -> None:
        """Check that what cannot be embedded is refused with a reason."""
        self.refused(cluster, "dimensions", "Hello", dimensions=100_000)
        self.refused(cluster, "dimensions", "Hello", dimensions=0)
        self.refused(cluster, "context length", "fox " * 20_000)
        self.refused(cluster, "context length", [3] * 20_000)
        self.refused(cluster, "vocabulary", [100_000])
        self.refused(cluster, "vocabulary", [[3], [3, 100_000]])
        self.refused(cluster, "empty", ["Hello", ""])

    def busy(self, cluster: Cluster, worker: Worker) -> EmbeddingLoad:
        """Start a load, and wait until some of it is in flight on this worker."""
        load = EmbeddingLoad(cluster)
        eventually(lambda: worker.metric("dynamo_worker_in_flight") > 0, 20.0, "requests in flight")
        assert not load.over, "the load is over; does it end too soon?"
        return load

    def each_process(self, cluster: Cluster, subject: Subject, *arguments: str) -> Iterator[tuple[Worker, int]]:
        """Yield a worker for each process of the engine, and that process."""
        for pattern in subject.processes.values():
            (worker,) = cluster.serve(1, "--grace-period", "1", *arguments)
            eventually(lambda: self.embed(cluster, "Hello")[0] == 200, 30.0, "an answer")
            yield worker, worker.engine_process(pattern)

    def check_unanswered(self, load: EmbeddingLoad) -> None:
        """Check that every request is answered, or that its client is told to ask again."""
        for status, body in load.wait():
            assert status in (200, 503), (status, body)
            if status == 200:
                assert len(body["data"]) == load.inputs

    @pytest.mark.slow
    def test_engine_process_killed(self, cluster: Cluster, subject: Subject) -> None:
        """The worker ends with the reason, and nothing is left; clients may ask again."""
        for worker, process in self.each_process(cluster, subject):
            load = self.busy(cluster, worker)
            worker.signal(signal.SIGKILL, process)
            assert worker.wait_gone(3.0 * subject.patience) == 1
            assert "Fatal error kind=EngineDeadError" in worker.log
            self.check_unanswered(load)

    @pytest.mark.slow
    def test_engine_process_stopped(self, cluster: Cluster, subject: Subject) -> None:
        """An idle engine that stands still is found by a canary, which is a request for an embedding here."""
        bound = ("--stall-timeout", str(subject.stall_timeout))
        for worker, process in self.each_process(cluster, subject, *bound):
            worker.signal(signal.SIGSTOP, process)
            assert worker.wait_gone((subject.stall_timeout + 1.0) * subject.patience) == 1
            assert "Fatal error kind=EngineStalledError" in worker.log

    @pytest.mark.slow
    def test_engine_process_stopped_at_work(self, cluster: Cluster, subject: Subject) -> None:
        """So is one with requests in flight."""
        bound = ("--stall-timeout", str(subject.stall_timeout))
        for worker, process in self.each_process(cluster, subject, *bound):
            load = self.busy(cluster, worker)
            worker.signal(signal.SIGSTOP, process)
            assert worker.wait_gone((subject.stall_timeout + 1.0) * subject.patience) == 1
            assert "Fatal error kind=EngineStalledError" in worker.log
            self.check_unanswered(load)
