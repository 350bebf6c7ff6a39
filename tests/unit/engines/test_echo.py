"""The echo engine answers what it should, at the rate it should, and dies as it should."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import EngineContext, HasCanary, LocalContext, ReportsProgress
from dynamo_worker.engines.echo import ANSWER_TOKEN, CONTEXT_LENGTH, MODEL_DIR, EchoRequest, plugin
from dynamo_worker.errors import EngineDeadError, InvalidRequestError, StartError
from dynamo_worker.kit.child_messages import line
from dynamo_worker.kit.python_command import python_command

TEXT = st.lists(st.integers(3, 258), min_size=1, max_size=40)


def make(tmp_path, *arguments):
    parser = argparse.ArgumentParser()
    plugin.add_arguments(parser)
    context = EngineContext(component="ns.backend", private_dir=tmp_path, supervised=False)
    return plugin.create_engine(parser.parse_args(arguments), context)


@contextlib.asynccontextmanager
async def started(tmp_path, *arguments):
    engine = make(tmp_path, *arguments)
    try:
        await engine.start(1)
        yield engine
    finally:
        await engine.shutdown(Deadline.after(10))


def request(text, max_tokens=None, answered=()):
    """Return a request as the frontend makes it; ``answered`` is what another worker has already sent."""
    tokens = [*text, ANSWER_TOKEN, *answered]
    return {"token_ids": tokens, "stop_conditions": {"max_tokens": max_tokens}}


async def answer(engine, body, request_id="r"):
    chunks = [chunk async for chunk in engine.generate(body, LocalContext(request_id))]
    assert all(chunk.get("finish_reason") is None for chunk in chunks[:-1])
    return [token for chunk in chunks for token in chunk["token_ids"]], chunks[-1]["finish_reason"]


def expected(text, count):
    return list(itertools.islice(itertools.cycle(text), count))


# ------------------------------------------------------------------------------------------------------- what it says


@given(TEXT, st.integers(0, 200))
def test_the_text_over_and_over(text, count):
    echo = EchoRequest.parse(request(text, count))
    assert [echo.token(index) for index in range(echo.count)] == expected(text, count)
    assert echo.finish_reason == "length"


@given(TEXT)
def test_without_a_limit_the_text_once(text):
    echo = EchoRequest.parse(request(text))
    assert [echo.token(index) for index in range(echo.count)] == text
    assert echo.finish_reason == "stop"


@given(TEXT, st.none() | st.integers(1, 200), st.data())
def test_a_migrated_request_gives_the_same_text_as_one_that_was_not(text, count, data):
    """The frontend sends what was already answered behind the prompt, and asks for that much less."""
    whole = EchoRequest.parse(request(text, count))
    answer = [whole.token(index) for index in range(whole.count)]
    split = data.draw(st.integers(0, len(answer) - 1), label="split")  # the last token comes with the finish reason
    rest = EchoRequest.parse(request(text, None if count is None else count - split, answer[:split]))
    assert answer[:split] + [rest.token(index) for index in range(rest.count)] == answer
    assert rest.finish_reason == whole.finish_reason


@given(TEXT, st.integers(2, 60), st.data())
def test_a_request_may_migrate_again_and_again(text, count, data):
    sent = []
    while len(sent) < count:
        echo = EchoRequest.parse(request(text, count - len(sent), sent))
        assert echo.count == count - len(sent)
        part = data.draw(st.integers(1, echo.count))
        sent += [echo.token(index) for index in range(part)]
    assert sent == expected(text, count)


@pytest.mark.parametrize("arguments", [(), ("--process-tree",)], ids=["in process", "process tree"])
def test_both_engines_stream_what_the_request_says(tmp_path, arguments):
    async def main():
        async with started(tmp_path, *arguments) as engine:
            assert await answer(engine, request([5, 6, 7], 8), "a") == ([5, 6, 7, 5, 6, 7, 5, 6], "length")
            assert await answer(engine, request([5, 6, 7]), "b") == ([5, 6, 7], "stop")
            assert await answer(engine, request([5, 6, 7], 0), "c") == ([], "length")
            assert await answer(engine, request([5, 6, 7], 3, [5, 6]), "d") == ([7, 5, 6], "length")
            assert await answer(engine, {"token_ids": [9, 8]}, "e") == ([9, 8], "stop"), "without the chat template"

    asyncio.run(main())


@pytest.mark.parametrize("arguments", [(), ("--process-tree",)], ids=["in process", "process tree"])
def test_requests_at_once_do_not_mix(tmp_path, arguments):
    async def main():
        async with started(tmp_path, *arguments) as engine:
            answers = await asyncio.gather(
                *(answer(engine, request([number, number + 100], 25), str(number)) for number in range(3, 43))
            )
            for number, (tokens, reason) in enumerate(answers, 3):
                assert (tokens, reason) == (expected([number, number + 100], 25), "length")

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sampling_options": {"n": 2}}, "n must be 1"),
        ({"sampling_options": {"guided_decoding": {"json": {}}}}, "guided_decoding"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search"),
        ({"sampling_options": {"n": "2"}}, "sampling_options.n: expected an integer"),
        ({"sampling_options": [1]}, "sampling_options: expected an object"),
        ({"stop_conditions": {"max_tokens": math.nan}}, "stop_conditions.max_tokens: expected an integer"),
        ({"stop_conditions": {"max_tokens": math.inf}}, "stop_conditions.max_tokens: expected an integer"),
        ({"stop_conditions": {"max_tokens": "3"}}, "stop_conditions.max_tokens: expected an integer"),
        ({"stop_conditions": "x"}, "stop_conditions: expected an object"),
        ({"token_ids": [ANSWER_TOKEN]}, "nothing to echo"),
        ({"token_ids": [5] * CONTEXT_LENGTH}, f"context length is {CONTEXT_LENGTH}"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(body, message):
    with pytest.raises(InvalidRequestError, match=message):
        EchoRequest.parse({**request([5]), **body})


@pytest.mark.parametrize(
    "options", [None, {}, {"n": 1, "temperature": 0.7, "guided_decoding": None, "use_beam_search": False}]
)
def test_what_changes_nothing_is_accepted(options):
    assert EchoRequest.parse({"token_ids": [5, 6], "sampling_options": options, "stop_conditions": None}).count == 2


def test_an_answer_ends_at_the_context_length():
    echo = EchoRequest.parse({"token_ids": [5] * (CONTEXT_LENGTH - 3), "stop_conditions": {"max_tokens": 10}})
    assert echo.count == 3


@pytest.mark.parametrize(
    "flags", [["--tokens-per-second", "-1"], ["--start-seconds", "-0.1"], ["--prefill-seconds", "x"]]
)
def test_flags_are_checked(tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        make(tmp_path, *flags)
    assert flags[0] in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- model


def test_the_model_directory_has_what_frontends_read():
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert special["<|answer|>"] == ANSWER_TOKEN
    template = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())["chat_template"]
    assert template.endswith("<|answer|>"), "what stands behind it was answered before"


def test_what_it_tells_routers(tmp_path):
    async def main():
        async with started(tmp_path, "--model-name", "parrot") as engine:
            info = await engine.start(1)
            assert (info.model_name, info.model_path) == ("parrot", str(MODEL_DIR))
            assert info.context_length == CONTEXT_LENGTH
            assert list(engine.processes()) == []

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- its speed


@pytest.mark.parametrize("arguments", [(), ("--process-tree",)], ids=["in process", "process tree"])
def test_the_rate_is_kept(tmp_path, arguments):
    async def main():
        async with started(tmp_path, "--tokens-per-second", "200", *arguments) as engine:
            begin = time.monotonic()
            await asyncio.gather(*(answer(engine, request([5], 61), str(number)) for number in range(4)))
            return time.monotonic() - begin

    took = asyncio.run(main())
    assert took >= 0.28, "60 intervals of 5 ms"
    assert took < 2


def test_start_and_prefill_take_their_time_and_the_prefill_shows_progress(tmp_path):
    async def main():
        begin = time.monotonic()
        async with started(tmp_path, "--start-seconds", "0.1", "--prefill-seconds", "0.25") as engine:
            assert time.monotonic() - begin >= 0.1
            assert isinstance(engine, ReportsProgress)
            begin, before = time.monotonic(), engine.progress()
            await answer(engine, request([5], 1))
            assert time.monotonic() - begin >= 0.25
            assert engine.progress() - before >= 3

    asyncio.run(main())


def test_the_canary_is_one_token(tmp_path):
    async def main():
        async with started(tmp_path) as engine:
            assert isinstance(engine, HasCanary)
            tokens, _ = await answer(engine, engine.canary_request())
            assert len(tokens) == 1

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------- the process tree


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def segments_of(pid):
    return [Path(path) for path in set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))]


@pytest.mark.parametrize("victim", ["core", "rank"])
def test_a_process_that_dies_ends_every_request(tmp_path, victim):
    async def main():
        async with started(tmp_path, "--process-tree", "--tokens-per-second", "100") as engine:
            core, rank = engine.processes()
            await engine.check_health()
            running = [asyncio.ensure_future(answer(engine, request([5], 5000), str(number))) for number in range(3)]
            await asyncio.sleep(0.1)
            os.kill(core if victim == "core" else rank, signal.SIGKILL)
            for task in running:
                with pytest.raises(EngineDeadError):
                    await asyncio.wait_for(task, 5)
            with pytest.raises(EngineDeadError):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await answer(engine, request([5], 1), "late")
            await engine.abort("0")

    asyncio.run(main())


def test_an_aborted_request_leaves_the_others_alone(tmp_path):
    async def main():
        async with started(tmp_path, "--process-tree", "--tokens-per-second", "200") as engine:
            staying = asyncio.ensure_future(answer(engine, request([5, 6], 40), "staying"))
            leaving = asyncio.ensure_future(answer(engine, request([7], 100_000), "leaving"))
            await asyncio.sleep(0.05)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
            await engine.abort("leaving")
            await engine.abort("nobody")
            assert await staying == (expected([5, 6], 40), "length")
            assert await answer(engine, request([8], 2), "leaving") == ([8, 8], "length"), "the id is free again"

    asyncio.run(main())


@pytest.mark.parametrize("stopped", [None, "core", "rank"])
def test_shutdown_leaves_nothing(tmp_path, stopped):
    async def main():
        engine = make(tmp_path, "--process-tree")
        await engine.start(1)
        core, rank = engine.processes()
        assert all(alive(pid) for pid in (core, rank))
        segments = segments_of(core)
        assert segments
        assert list(tmp_path.iterdir()), "it keeps files, as the big engines do"
        if stopped:
            os.kill(core if stopped == "core" else rank, signal.SIGSTOP)
        begin = time.monotonic()
        await engine.shutdown(Deadline.after(5))
        assert time.monotonic() - begin < 4, "it ended by itself, not by the deadline"
        assert not alive(core)
        assert not alive(rank)
        assert list(tmp_path.iterdir()) == []
        assert not any(segment.exists() for segment in segments)
        await engine.shutdown(Deadline.after(5))
        assert list(engine.processes()) == []

    asyncio.run(main())


def test_processes_whose_worker_is_killed_say_nothing(tmp_path):
    """A connection that is reset under them is the end, not an error with a traceback."""
    ours, theirs = socket.socketpair()
    command = [*python_command("dynamo_worker.kit.child_main"), "dynamo_worker.engines.echo_process:Core"]
    environment = {**os.environ, "DYNAMO_WORKER_CHILD_FD": str(theirs.fileno())}
    with theirs:
        core = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.PIPE)
    options = {"tokens_per_second": 0.0, "private_dir": str(tmp_path)}
    with ours:
        ours.sendall(line({"start": options, "most_bytes": 1 << 20, "path": []}))
        assert b"rank_pid" in ours.recv(4096)
        ours.sendall(line({"add": 1, "id": "r", "payload": 100_000}))
        assert b"chunks" in ours.recv(4096)
        select.select([ours], [], [], 10)  # tokens that nobody will read: the connection is reset
    assert core.communicate(timeout=10) == (None, b"")
    assert core.returncode == 0


def test_a_core_that_does_not_come_up_is_a_failed_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main():
        engine = make(tmp_path, "--process-tree")
        with pytest.raises(StartError, match="exited with code 1"):
            await engine.start(1)
        await engine.shutdown(Deadline.after(5))

    asyncio.run(main())


def test_shutting_down_what_never_started_does_nothing(tmp_path):
    asyncio.run(make(tmp_path, "--process-tree").shutdown(Deadline.after(1)))
    assert list(tmp_path.iterdir()) == []
