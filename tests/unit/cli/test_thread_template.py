"""The template `thread`: the errors of an engine in a thread, which the toy does not have."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading

import pytest

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.cli.package_writer import TEMPLATES, write
from dynamo_worker.cli.plugin_names import PluginNames
from dynamo_worker.deadline import Deadline


@pytest.fixture(scope="module")
def engine_thread(tmp_path_factory):
    """Return the module `engine_thread` of a new package."""
    directory = tmp_path_factory.mktemp("package")
    write(TEMPLATES["thread"], PluginNames.of("in-a-thread"), directory)
    sys.path.insert(0, str(directory / "src"))
    try:
        return importlib.import_module("dynamo_worker_in_a_thread.engine_thread")
    finally:
        sys.path.remove(str(directory / "src"))


class Engine:
    """Answers each request with its prompt; what is negative in a prompt is an error."""

    def __init__(self):
        self.jobs = {}
        self.aborted = []
        self.closed = False

    def add(self, key, prompt, parameters):
        if prompt[0] == -1:
            raise InvalidRequestError("minus one")
        self.jobs[key] = list(prompt)

    def abort(self, key):
        self.aborted.append(key)
        self.jobs.pop(key, None)

    def step(self):
        if any(-2 in job for job in self.jobs.values()):
            raise ValueError("minus two")
        outputs = {key: (job.pop(0), None if job else "length") for key, job in self.jobs.items()}
        self.jobs = {key: job for key, job in self.jobs.items() if job}
        return outputs

    def close(self):
        self.closed = True


async def tokens(answer):
    found = []
    while True:
        output = await asyncio.wait_for(answer.get(), 10)
        if isinstance(output, BaseException):
            raise output
        found.append(output[0])
        if output[1]:
            return found


def test_a_request_that_is_refused_harms_no_other(engine_thread):
    async def check():
        engine = Engine()
        thread = engine_thread.EngineThread(lambda: engine)
        await thread.start()
        good, bad, later = (thread.add(prompt, {}) for prompt in ([5, 6, 7], [-1], [8]))
        with pytest.raises(InvalidRequestError, match="minus one"):
            await tokens(bad)
        assert [await tokens(good), await tokens(later)] == [[5, 6, 7], [8]]
        await thread.stop(Deadline.after(5))
        assert engine.closed

    asyncio.run(check())


def test_an_engine_that_fails_ends_every_answer_and_takes_no_other(engine_thread):
    async def check():
        thread = engine_thread.EngineThread(Engine)
        await thread.start()
        for answer in [thread.add([1, -2], {}), thread.add(list(range(1000, 0, -1)), {})]:
            with pytest.raises(EngineDeadError, match="minus two"):
                await tokens(answer)
        assert "minus two" in thread.error
        with pytest.raises(EngineDeadError, match="minus two"):
            await tokens(thread.add([1], {}))
        await thread.stop(Deadline.after(5))

    asyncio.run(check())


def test_an_engine_that_cannot_be_loaded_says_why(engine_thread):
    def load():
        raise OSError("no such model")

    async def check():
        thread = engine_thread.EngineThread(load)
        with pytest.raises(OSError, match="no such model"):
            await thread.start()
        await thread.stop(Deadline.after(5))

    asyncio.run(check())


def test_a_stop_while_it_loads_ends_the_thread(engine_thread):
    go_on = threading.Event()

    async def check():
        engine = Engine()
        thread = engine_thread.EngineThread(lambda: go_on.wait(10) and engine)
        starting = asyncio.ensure_future(thread.start())
        await asyncio.sleep(0.05)
        starting.cancel()
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        await thread.stop(Deadline.after(5))
        assert engine.closed

    asyncio.run(check())


def test_an_engine_that_hangs_is_left_at_the_deadline(engine_thread):
    go_on = threading.Event()

    async def check():
        thread = engine_thread.EngineThread(lambda: go_on.wait(10) and Engine())
        starting = asyncio.ensure_future(thread.start())
        await asyncio.sleep(0.05)
        starting.cancel()
        deadline = Deadline.after(0.5)
        await thread.stop(deadline)
        assert not deadline.passed
        go_on.set()

    asyncio.run(check())


def test_an_aborted_request_ends_in_the_engine(engine_thread):
    async def check():
        engine = Engine()
        thread = engine_thread.EngineThread(lambda: engine)
        await thread.start()
        answer = thread.add(list(range(10**6)), {})
        await answer.get()
        thread.abort(answer)
        thread.abort(answer)
        with pytest.raises(asyncio.CancelledError):
            await tokens(answer)
        assert await tokens(thread.add([9], {})) == [9]
        assert (engine.aborted, engine.jobs) == ([answer], {})
        await thread.stop(Deadline.after(5))

    asyncio.run(check())
