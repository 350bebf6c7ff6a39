"""What clients and operators get from whole workers behind the real frontend, whatever the engine.

Answers, adapters, operations that take the engine out of discovery, KV-aware routing, prefill and decode on different
workers, several ranks. A plugin's tests derive from :class:`Serving` and say what the engine calls things::

    class TestServing(Serving):
        METRICS = Metrics("vllm:request_success_total", "vllm:generation_tokens_total", "vllm:num_requests_running")
        KV_EVENTS = ("--publish-kv-events", "--block-size", "32")

The subject serves the fixture ``tiny_model``: greedy, and never ending an answer early. What an engine does not say it
has is skipped.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
import uuid
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest

from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.plugin import leftovers_refused, private_cluster
from dynamo_worker.testing.tiny_model import make_adapter
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dynamo_worker.testing.cluster import Cluster, Worker
    from dynamo_worker.testing.subject import Subject


class Metrics(NamedTuple):
    """The engine's own metrics that the tests look at.

    :param requests: counts the requests that were answered.
    :param tokens: counts the tokens that were made.
    :param running: how many requests the engine works at.
    :param flags: what makes the engine have metrics.
    """

    requests: str
    tokens: str
    running: str
    flags: Sequence[str] = ()


class Pause(NamedTuple):
    """An operation that takes the engine out of discovery.

    :param away: its route.
    :param back: the route of the operation that undoes it.
    :param body: what it is asked with.
    """

    away: str
    back: str
    body: Mapping[str, Any] = {}


class Division(NamedTuple):
    """How workers share the work on a request.

    :param prefill: flags of those that read the prompt.
    :param decode: flags of those that write the answer.
    """

    prefill: Sequence[str]
    decode: Sequence[str]


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Return the mark of a test with so many ranks, each on a GPU of its own; without any GPU they share the CPU."""
    import torch

    return pytest.mark.skipif(0 < torch.cuda.device_count() < count, reason="every rank needs a GPU of its own")


class SharedWorker:
    """One worker behind a frontend, for several tests.

    :ivar cluster: where it serves; None while there is none.
    """

    worker: Worker

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self._stack = contextlib.ExitStack()

    def serve(self, directory: Path, subject: Subject, engine_args: list[str], flags: Sequence[str]) -> None:
        """Start the worker and wait until it serves."""
        marker = uuid.uuid4().hex
        with contextlib.ExitStack() as stack:
            leftovers = stack.enter_context(leftovers_refused(marker))
            cluster = stack.enter_context(private_cluster(directory, leftovers, marker, subject, engine_args))
            (self.worker,) = cluster.serve(1, *flags)
            self._stack = stack.pop_all()
        self.cluster = cluster

    def close(self) -> None:
        """Stop the worker.

        :raises AssertionError: it does not end well, or leaves something behind.
        """
        cluster, self.cluster = self.cluster, None
        with self._stack:
            if cluster is not None:
                self.worker.stop()


class Serving:
    """The tests. Those that begin with ``check`` are parts, for tests with an end of their own."""

    METRICS: ClassVar[Metrics]
    #: Requests that the engine refuses, and a word of the message.
    REFUSED: ClassVar[Sequence[tuple[Mapping[str, Any], str]]] = ()
    #: Flags of a worker that can load LoRA adapters of rank 8 for ``q_proj`` and ``v_proj``.
    ADAPTERS: ClassVar[Sequence[str]] = ()
    PAUSES: ClassVar[Sequence[Pause]] = ()
    #: Flags of a worker that says which blocks, of 32 tokens at the most, its KV cache holds.
    KV_EVENTS: ClassVar[Sequence[str]] = ()
    #: Flags that would open the engine to the network, were they not kept from it with a frontend on loopback.
    HOST: ClassVar[Sequence[str]] = ()

    @pytest.fixture
    def engine_args(self, subject: Subject) -> list[str]:
        """Start every worker of the cluster with the subject's arguments; it leaves at once when it is asked to."""
        return [*subject.args, "--grace-period", "0"]

    @pytest.fixture
    def division(self) -> Division:
        """Return how prefill and decode are divided; an engine that can do that has a fixture of its own."""
        pytest.skip("this engine does not divide requests")

    # -------------------------------------------------------------------------------------------------- answers

    @pytest.fixture(scope="class")
    def shared(self) -> Iterator[SharedWorker]:
        """Return the worker that the tests of answers share; it starts with the first of them."""
        shared = SharedWorker()
        yield shared
        shared.close()

    @pytest.fixture(autouse=True)
    def one_cluster_at_a_time(self, request: pytest.FixtureRequest, shared: SharedWorker) -> None:
        """End the shared worker before a test that starts its own."""
        if "answering" not in request.fixturenames:
            shared.close()

    @pytest.fixture
    def answering(
        self,
        shared: SharedWorker,
        subject: Subject,
        engine_args: list[str],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Cluster:
        """Return the cluster of the shared worker, which serves."""
        if shared.cluster is None:
            shared.serve(tmp_path_factory.mktemp("answers"), subject, engine_args, self.METRICS.flags)
        assert shared.cluster is not None
        return shared.cluster

    def test_a_greedy_answer_is_the_same_every_time(self, answering: Cluster) -> None:
        """The model's own generation configuration says that it is greedy."""
        status, answer = answering.chat()
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answering.chat()[1]["choices"][0]["message"] == answer["choices"][0]["message"]

    def test_log_probabilities(self, answering: Cluster) -> None:
        _, answer = answering.chat(logprobs=True, top_logprobs=3)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == 8
        assert all(len(entry["top_logprobs"]) == 3 for entry in content)
        assert all(entry["logprob"] <= 0 for entry in content)

    def test_several_answers(self, answering: Cluster) -> None:
        # At random a model may end an answer early.
        status, answer = answering.complete(n=3, temperature=1.0, min_tokens=8)
        assert status == 200
        assert {choice["index"] for choice in answer["choices"]} == {0, 1, 2}
        assert answer["usage"]["completion_tokens"] == 24

    def test_an_answer_that_follows_a_json_schema(self, answering: Cluster) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        answer_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, answer = answering.chat(response_format=answer_format, max_tokens=200, temperature=1.0)
        assert status == 200, answer
        text = answer["choices"][0]["message"]["content"]
        assert text.lstrip().startswith("{"), text

    def test_a_minimum_of_tokens(self, answering: Cluster) -> None:
        _, answer = answering.complete(min_tokens=6, max_tokens=6, temperature=1.0)
        assert answer["usage"]["completion_tokens"] == 6, answer

    def test_wrong_requests_are_refused_with_a_reason(self, answering: Cluster) -> None:
        refused: list[tuple[Mapping[str, Any], str]] = [
            ({"prompt": "a " * 3000}, "context"),
            ({"temperature": 0.5, "best_of": 3}, "best_of"),
            *self.REFUSED,
        ]
        for wrong, message in refused:
            status, answer = answering.complete(**wrong)
            assert 400 <= status < 500, (wrong, answer)
            assert message in json.dumps(answer), (wrong, answer)
        assert answering.complete()[0] == 200

    def test_the_engines_own_metrics(self, answering: Cluster, shared: SharedWorker) -> None:
        assert answering.complete()[0] == 200
        code, metrics = shared.worker.status("/metrics")
        assert code == 200
        for name in (self.METRICS.requests, self.METRICS.tokens, self.METRICS.running):
            assert name in metrics

    def test_a_client_who_leaves(self, answering: Cluster, subject: Subject, shared: SharedWorker) -> None:
        """Nothing works any more for a client who has gone away."""
        cluster, worker = answering, shared.worker
        before = worker.metric(self.METRICS.tokens)
        load = Load(cluster.url, [chat(subject.model, "The quick brown fox", subject.stream_tokens)], timeout=1.0)
        eventually(load.started, 10, "the stream")
        assert not load.wait()[0].ok, "the stream was over before the client left"
        eventually(lambda: worker.metric("dynamo_worker_in_flight") == 0, 5, "the request to leave the worker")
        eventually(lambda: worker.metric(self.METRICS.running) == 0, 5, "the request to leave the engine")
        made = worker.metric(self.METRICS.tokens) - before
        assert made < subject.stream_tokens, made

    # ----------------------------------------------------------------------------------------------- operations

    def test_operations(self, cluster: Cluster, subject: Subject, tmp_path: Path) -> None:
        self.check_operations(cluster, subject, tmp_path).stop()

    def check_operations(self, cluster: Cluster, subject: Subject, tmp_path: Path, *flags: str) -> Worker:
        """Check the operations that engines have in common; return the worker, which serves on.

        :param flags: what the worker is started with beside :attr:`ADAPTERS`.
        """
        roots = ("--control-load-root", str(tmp_path), "--control-write-root", str(tmp_path))
        (worker,) = cluster.serve(1, "--stall-timeout", str(subject.stall_timeout), *self.ADAPTERS, *roots, *flags)
        if self.ADAPTERS:
            self.check_adapters(cluster, worker, make_adapter(tmp_path / "adapter"))
        for number, pause in enumerate(self.PAUSES):
            answer = worker.operate(pause.away, dict(pause.body))
            assert answer["status"] == "success", answer
            eventually(lambda: not cluster.models(), 10, f"the worker to leave discovery for {pause.away}")
            if number == 0:
                time.sleep(1.2 * subject.stall_timeout)  # who pauses is not stalled
            answer = worker.operate(pause.back)
            assert answer["status"] == "success", answer
            cluster.wait_model()
            eventually(lambda: cluster.complete()[0] == 200, 10, f"an answer after {pause.back}")
        return worker

    def check_adapters(self, cluster: Cluster, worker: Worker, adapter: Path) -> None:
        """Check that an adapter can be loaded, used and unloaded, and that the model itself stays as it is."""
        plain = cluster.complete()[1]["choices"][0]["text"]
        nowhere = {"lora_name": "x", "source": {"uri": f"{adapter}/nowhere"}}
        assert "adapter_config" in worker.operate("load_lora", nowhere)["message"]
        elsewhere = {"lora_name": "x", "source": {"uri": "/etc"}}
        assert "not below" in worker.operate("load_lora", elsewhere)["message"]
        before = worker.operate("list_loras")["count"]
        load = {"lora_name": "adapted", "source": {"uri": f"file://{adapter}"}}
        for _ in range(2):
            answer = worker.operate("load_lora", load)
            assert answer["status"] == "success", answer
        assert worker.operate("list_loras")["count"] == before + 1
        eventually(lambda: "adapted" in cluster.models(), 10, "the adapter in /v1/models")
        status, answer = cluster.complete(model="adapted")
        assert status == 200, answer
        assert answer["choices"][0]["text"] != plain
        assert cluster.complete()[1]["choices"][0]["text"] == plain
        assert worker.operate("unload_lora", {"lora_name": "adapted"})["status"] == "success"
        eventually(lambda: "adapted" not in cluster.models(), 10, "the adapter to leave /v1/models")

    # --------------------------------------------------------------------------------------------------- network

    @pytest.mark.parametrize("router", ["round-robin", "kv"])
    def test_all_is_on_loopback_with_a_frontend_there(self, cluster: Cluster, router: str) -> None:
        self.check_loopback(cluster, router).stop()

    def check_loopback(self, cluster: Cluster, router: str, *flags: str) -> Worker:
        """Check that nobody on another machine can connect to a worker whose frontend is on loopback.

        :param flags: further ones.
        :returns: the worker, which serves on.
        """
        published = self.KV_EVENTS if router == "kv" else ()
        worker = cluster.worker_with_frontend("--router-mode", router, *published, *self.HOST, *flags)
        assert cluster.complete()[0] == 200
        # The ports of the runtime's publishers are closed by their interface; without a router for them there are none.
        listening = worker.listening()
        assert listening
        open_doors = [each for each in listening if not (each.local if router == "kv" else each.on_loopback)]
        assert not open_doors, open_doors
        return worker

    # ------------------------------------------------------------------------------------------- several workers

    def test_a_repeated_prefix_goes_to_the_worker_that_holds_it(self, cluster: Cluster) -> None:
        if not self.KV_EVENTS:
            pytest.skip("this engine publishes no KV events")
        workers = cluster.serve(2, *self.KV_EVENTS, *self.METRICS.flags, frontend=("--router-mode", "kv"))
        self.check_prefixes_are_found(cluster)
        served = [worker.metric(self.METRICS.requests) for worker in workers]
        assert all(served), f"one worker got everything: {served}"
        for worker in workers:
            worker.stop()

    def check_prefixes_are_found(self, cluster: Cluster) -> None:
        """Check that each of several prompts goes where its prefix is cached when it is repeated."""
        prompts = [str(number) * 200 for number in range(8)]
        for prompt in prompts:
            assert cluster.complete(prompt)[0] == 200

        def hits() -> int:
            answers = [cluster.complete(prompt + "x")[1] for prompt in prompts]
            details = [answer["usage"].get("prompt_tokens_details") or {} for answer in answers]
            return sum(bool(detail.get("cached_tokens")) for detail in details)

        eventually(lambda: hits() == len(prompts), 20, "every repeated prefix to be found in a cache")

    def test_prefill_here_and_decode_there(self, cluster: Cluster, division: Division) -> None:
        """Two workers of each kind; one of each is killed with requests in flight, and nothing is lost."""
        cluster.start_frontend()
        flags = self.METRICS.flags
        decode = [cluster.start_worker(*flags, *division.decode) for _ in range(2)]
        prefill = [cluster.start_worker("--component", "prefill", *flags, *division.prefill) for _ in range(2)]
        for worker in (*decode, *prefill):
            worker.wait_ready()
        cluster.wait_model()
        eventually(lambda: cluster.chat()[0] == 200, 20, "an answer")

        def served(*workers: Worker) -> list[float]:
            return [worker.metric(self.METRICS.requests) for worker in workers]

        before = served(*prefill, *decode)
        for number in range(4):
            status, answer = cluster.complete(f"{number}23456789" * 20, max_tokens=20)
            assert status == 200, answer
            assert answer["usage"]["completion_tokens"] == 20
        after = served(*prefill, *decode)
        assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)

        load = cluster.load(8, 1000, prompt="0123456789" * 20)
        assert decode[0].metric("dynamo_worker_in_flight") > 0
        decode[0].signal(signal.SIGKILL, decode[0].worker_pid)
        assert decode[0].wait_gone() == 128 + signal.SIGKILL
        assert all(result.ok for result in load.wait()), load.summary()

        # What is sent to a stopped worker is in flight there until it is killed.
        prefill[0].signal(signal.SIGSTOP, prefill[0].worker_pid)
        load = Load(cluster.url, [chat(cluster.model, f"{number}" * 300, 50) for number in range(8)])
        time.sleep(1)
        assert not load.started()
        prefill[0].signal(signal.SIGKILL, prefill[0].worker_pid)
        assert prefill[0].wait_gone() == 128 + signal.SIGKILL
        assert all(result.ok for result in load.wait()), load.summary()
        before = served(prefill[1])
        assert cluster.complete("abcdefghij" * 20)[0] == 200
        assert served(prefill[1]) > before
        for worker in (prefill[1], decode[1]):
            worker.stop()

    def check_ranks(self, cluster: Cluster, subject: Subject, *flags: str, processes: Sequence[str]) -> Worker:
        """Check that an engine of several ranks serves, and that the death of one of them is that of the worker.

        :param flags: what gives the engine several ranks.
        :param processes: patterns of processes that there are exactly one of; the last one is killed.
        :returns: another such worker, which serves on.
        """
        worker, spare = cluster.serve(2, *flags)
        cluster.wait_routed(spare)
        victims = [worker.child(pattern) for pattern in processes]
        load = cluster.load(subject.streams, 500)
        since = worker.signal(signal.SIGKILL, victims[-1])
        assert worker.wait_gone(5.0 * subject.patience) == 1
        print(f"gone after {time.monotonic() - since:.3f} s")
        assert "Fatal error kind=EngineDeadError" in worker.log
        assert all(result.ok for result in load.wait()), load.summary()
        return spare
