"""An engine in a process of its own: answers, and every way in which the process can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import child_engines
import pytest
import uvloop

from dynamo_worker import Deadline, EngineDeadError, InvalidRequestError, StartError
from dynamo_worker.kit import child_exchange
from dynamo_worker.kit.child_process import ChildProcess

Test = Callable[[ChildProcess], Awaitable[None]]


@contextlib.asynccontextmanager
async def running(kind: str = "Counting", options: Any = None, **more: Any) -> AsyncIterator[ChildProcess]:
    child = ChildProcess("the toy engine", f"{child_engines.__name__}:{kind}", options, **more)
    await child.start()
    try:
        yield child
    finally:
        await child.shutdown(Deadline.after(5))


def run(test: Test, kind: str = "Counting", options: Any = None, **more: Any) -> None:
    async def main() -> None:
        async with running(kind, options, **more) as child:
            await asyncio.wait_for(test(child), 20)

    asyncio.run(main())


async def collect(child: ChildProcess, name: str = "a", **payload: Any) -> list[int]:
    return [chunk["count"] async for chunk in child.generate(name, {"count": 5, **payload})]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_many_requests_at_once_get_their_own_chunks(loop):
    async def main():
        async with running() as child:
            answers = await asyncio.gather(*(collect(child, str(number), count=number) for number in range(1, 60)))
            assert answers == [list(range(number)) for number in range(1, 60)]
            assert child.progress() >= 59
            assert child.info == {"pid": child.processes()[0]}
        assert child.processes() == []

    with contextlib.closing(loop()) as own:
        own.run_until_complete(main())


def test_a_cancelled_request_is_aborted_and_leaves_the_others_alone():
    async def test(child):
        other = asyncio.ensure_future(collect(child, "other", count=300))
        leaving = asyncio.ensure_future(collect(child, "leaving", count=10**9))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await child.ask("counts") == {"other": [pytest.approx(150, abs=150), 300]}
        assert await other == list(range(300))
        await child.abort("leaving")
        await child.abort("nobody")
        assert (await child.ask("log")).count("abort leaving") == 1

    run(test)


def test_a_closed_generator_aborts_and_one_that_never_began_sends_nothing():
    async def test(child):
        stream = child.generate("closed", {"count": 10**9})
        assert (await stream.__anext__())["count"] == 0
        await stream.aclose()
        never = child.generate("never", {"count": 5})
        await never.aclose()
        assert await child.ask("log") == ["add closed", "abort closed"]
        assert await collect(child, "closed") == [0, 1, 2, 3, 4], "the id is free again"

    run(test)


def test_an_abort_ends_the_generator():
    async def test(child):
        task = asyncio.ensure_future(collect(child, "a", count=10**9))
        await asyncio.sleep(0.05)
        await child.abort("a")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 2)
        assert await child.ask("counts") == {}

    run(test)


def test_two_requests_with_the_same_id_do_not_mix():
    async def test(child):
        first = asyncio.ensure_future(collect(child, "same", count=10**9))
        await asyncio.sleep(0.02)
        assert await collect(child, "same", count=50) == list(range(50))
        assert list(await child.ask("counts")) == ["same"], "the first goes on"
        first.cancel()
        await asyncio.wait([first])
        # Late chunks of a request do not reach the next one with its id.
        assert await collect(child, "same") == [0, 1, 2, 3, 4]

    run(test)


def test_what_an_engine_sends_after_an_abort_reaches_nobody():
    async def test(child):
        stream = child.generate("a", {"count": 10**9})
        await stream.__anext__()
        await stream.aclose()
        assert await collect(child, "b") == [0, 1, 2, 3, 4]
        steps = child.progress()
        await asyncio.sleep(0.2)
        assert child.progress() == steps, "without requests in progress it does not step"

    run(test, options={"ignores_abort": True})


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"refuse": "temperature"}, InvalidRequestError, "^refused: temperature$"),
        ({"add_fails": True}, RuntimeError, "the toy engine: KeyError: 'add fails'"),
        ({"at": 2, "do": "fail"}, RuntimeError, "the toy engine: out of blocks"),
        ({"at": 2, "do": "unsendable", "count": 10**9}, RuntimeError, "cannot be written as JSON: TypeError"),
        ({"at": 2, "do": "huge", "count": 10**9}, RuntimeError, "a chunk has .* bytes; at most 65536"),
    ],
)
def test_a_request_that_fails_ends_no_other(payload, error, message):
    async def test(child):
        other = asyncio.ensure_future(collect(child, "other", count=200))
        with pytest.raises(error, match=message):
            await collect(child, "bad", **payload)
        assert await other == list(range(200))
        assert await child.ask("counts") == {}, "the engine has forgotten it, too"
        assert await collect(child, "bad") == [0, 1, 2, 3, 4]

    run(test, most_bytes=1 << 16)


def test_a_payload_that_is_no_json_reaches_nobody():
    async def test(child):
        with pytest.raises(TypeError):
            await collect(child, "bad", count={1})
        assert await child.ask("log") == []

    run(test)


def test_questions():
    async def test(child):
        assert await child.ask("echo", {"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}
        with pytest.raises(RuntimeError, match="the toy engine: LookupError: unknown question: nonsense"):
            await child.ask("nonsense")
        await child.check_health()
        child.check()
        assert await asyncio.gather(*(child.ask("echo", number) for number in range(50))) == list(range(50))

    run(test)


# ----------------------------------------------------------------------------------------------------- back pressure


def test_a_slow_client_pauses_its_request_and_no_other():
    async def test(child):
        slow = child.generate("slow", {"count": 300, "filler": 5000})
        assert (await slow.__anext__())["count"] == 0
        await until(lambda: _logged(child, "pause slow"))
        made = (await child.ask("counts"))["slow"][0]
        assert await collect(child, "quick", count=100) == list(range(100))
        assert (await child.ask("counts"))["slow"][0] == made < 250
        assert [chunk["count"] async for chunk in slow] == list(range(1, 300))
        assert "resume slow" in await child.ask("log")

    run(test)


def test_an_engine_that_does_not_pause_loses_the_longest_answer_only(monkeypatch):
    monkeypatch.setattr(child_exchange, "_WAITING_BYTES", 1 << 20)

    async def test(child):
        small = child.generate("small", {"count": 20, "filler": 1000})
        slow = child.generate("slow", {"count": 10**9, "filler": 5000})
        await small.__anext__()
        await slow.__anext__()
        await until(lambda: _logged(child, "abort slow"))
        with pytest.raises(RuntimeError, match="reads too slowly"):
            async for _ in slow:
                pass
        assert len([chunk async for chunk in small]) == 19

    run(test, options={"ignores_pause": True})


async def _logged(child: ChildProcess, entry: str) -> bool:
    return entry in await child.ask("log")


def test_a_process_that_reads_nothing_blocks_no_caller():
    """The socket is full: what is sent is bounded, callers wait, and can be cancelled while they do."""

    async def test(child):
        (pid,) = child.processes()
        os.kill(pid, signal.SIGSTOP)
        long = {"ignored": "x" * 300_000}
        tasks = [
            asyncio.ensure_future(collect(child, str(number), count=5 if number > 2 else 10**9, **long))
            for number in range(40)
        ]
        longest, last = 0.0, time.monotonic()
        for _ in range(30):
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 0.5
        waiting = child._exchange._transport.get_write_buffer_size()
        assert waiting < 4 << 20, "of 12 MB"
        cancelled = [*tasks[:3], *tasks[-3:]]  # in the socket, and those that are not sent
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled, timeout=2)
        os.kill(pid, signal.SIGCONT)
        assert await asyncio.gather(*tasks[3:-3]) == [[0, 1, 2, 3, 4]] * 34
        log = await child.ask("log")
        assert "add 39" not in log, "it was cancelled before it was sent"
        assert log.count("abort 0") == log.count("add 0") == 1

    run(test)


def test_a_flood_does_not_block_the_loop():
    async def test(child):
        tasks = [asyncio.ensure_future(collect(child, str(number), count=2000, filler=500)) for number in range(20)]
        longest, last = 0.0, time.monotonic()
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert all(task.result() == list(range(2000)) for task in tasks)
        assert longest < 0.5

    run(test, options={"pause_seconds": None})


@pytest.mark.parametrize("kind", ["Counting", "CountingTasks"])
def test_long_errors_are_cut(kind):
    async def test(child):
        with pytest.raises(InvalidRequestError) as refusal:
            await collect(child, refuse="x" * 500_000)
        assert len(str(refusal.value)) < 2000
        with pytest.raises(RuntimeError, match="the answer has"):
            await child.ask("echo", "x" * 500_000)
        assert await collect(child) == [0, 1, 2, 3, 4]

    run(test, kind, most_bytes=1 << 16)


def test_a_limit_that_no_traceback_fits_is_refused():
    with pytest.raises(ValueError, match="most_bytes: 1000"):
        ChildProcess("the toy engine", "child_engines:Counting", most_bytes=1000)


# -------------------------------------------------------------------------------------------------------------- death


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("exit", "its process has exited with code 3"),
        ("kill", "its process was killed by SIGSEGV"),
        ("raise", "its process has failed: ArithmeticError: the step fails"),
        ("sys.exit", "its process has failed: the rank is gone"),
        ("broken", "its process has failed: ConnectionResetError: the rank's connection"),
        ("half a frame", "its process has exited with code 0"),
        ("close", "its process has closed its connection"),
        ("helper", "its process has exited with code 4"),
        ("write nonsense", r"its process has sent something that is no message: b'nonsense'"),
        ("write [1]", "no message: .*not an object"),
        ("bytes", "no message: .*utf-8"),
        ('write {"chunks": 5, "ended": []}', "no message"),
        ('write {"chunks": [1], "ended": []}', "a chunk without its request"),
        ('write {"chunks": [[], 5], "ended": []}', "no message"),
        ('write {"chunks": []}', "no message: .*'ended'"),
        ('write {"error": []}', "no message"),
        ("write " + "[" * 100_000, "no message"),
        ("endless", "its process has sent a message of more than 200000 bytes"),
    ],
)
def test_a_death_ends_every_request_after_the_chunks_that_came(what, message):
    async def test(child):
        others = [asyncio.ensure_future(collect(child, str(number), count=10**9)) for number in range(3)]
        await asyncio.sleep(0.02)
        chunks: list[int] = []

        async def read() -> None:
            async for chunk in child.generate("a", {"count": 5, "at": 3, "do": what}):
                chunks.append(chunk["count"])

        with pytest.raises(EngineDeadError, match=message):
            await read()
        assert chunks[:2] == [0, 1]
        for other in others:
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(other, 2)
        for call in (child.check_health(), child.ask("log"), collect(child, "late")):
            with pytest.raises(EngineDeadError, match=message):
                await call
        with pytest.raises(EngineDeadError):
            child.check()
        await child.abort("a")

    run(test, most_bytes=200_000)


def test_output_that_is_unread_at_the_death_is_not_lost():
    async def test(child):
        stream = child.generate("a", {"count": 5, "at": 1, "do": "all and exit"})
        await stream.__anext__()
        await until(lambda: _dead(child))
        assert [chunk["count"] async for chunk in stream] == list(range(500)), "the answer is complete"

    run(test)


async def _dead(child: ChildProcess) -> bool:
    with contextlib.suppress(EngineDeadError):
        child.check()
        return False
    return True


def test_a_question_ends_with_the_process():
    async def test(child):
        asked = asyncio.ensure_future(child.ask("hang"))
        await asyncio.sleep(0.05)
        os.kill(child.processes()[0], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await asyncio.wait_for(asked, 2)

    run(test)


def test_a_dead_process_is_not_reaped_before_the_shutdown():
    """The worker's own watch wants to say how it died, and its pid must not become another one's."""

    async def test(child):
        (pid,) = child.processes()
        with pytest.raises(EngineDeadError):
            await collect(child, at=1, do="exit")
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG).si_status == 3
        await child.shutdown(Deadline.after(2))
        with pytest.raises(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    run(test)


def test_a_hang_is_not_taken_for_health_nor_for_death():
    async def test(child):
        task = asyncio.ensure_future(collect(child, at=2, do="stop"))
        await asyncio.sleep(0.1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(child.check_health(), 0.2)
        child.check()
        steps = child.progress()
        await asyncio.sleep(0.2)
        assert child.progress() == steps
        assert not task.done()
        task.cancel()

    run(test)


@pytest.mark.parametrize("works", [True, False])
def test_steps_without_a_chunk_are_progress_if_they_do_something(works):
    async def test(child):
        task = asyncio.ensure_future(anext_of(child.generate("a", None)))
        await asyncio.sleep(0.3)
        assert (child.progress() > 0) == works
        assert not task.done()
        assert await task == "end"

    run(test, "Prefilling", {"works": works})


async def anext_of(stream: Any) -> Any:
    return await stream.__anext__()


# -------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("child_engines:FailsToStart", "raise", r"RuntimeError: no GPU is visible\n.*child_engines.py.*in start"),
        ("child_engines:FailsToStart", "exit", "its process has exited with code 7"),
        ("child_engines:FailsToStart", "kill", "its process was killed by SIGKILL"),
        ("child_engines:Missing", "", "AttributeError: .*Missing"),
        ("no_such_module:Engine", "", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("child_broken:Engine", "", r"ImportError: libcuda.so.1\n.*child_broken.py"),
        (["/no/such/program"], "", r"\[Errno 2\] No such file or directory"),
        (["/bin/false"], "", "its process has exited with code 1"),
        (["/bin/echo", "hello"], "", "its process has exited with code 0"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(target, kind, message, tmp_path, monkeypatch, capfd):
    (tmp_path / "child_broken.py").write_text("raise ImportError('libcuda.so.1')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))

    async def main():
        child = ChildProcess("the toy engine", target, {"kind": kind})
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StartError) as failure:
            await asyncio.wait_for(child.start(), 10)
        assert re.search(f"^the toy engine failed to start: {message}", str(failure.value), re.DOTALL)
        assert child.processes() == []
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(EngineDeadError):
            await collect(child)
        await child.shutdown(Deadline.after(1))

    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    if "RuntimeError" in message or "ImportError" in message:
        assert "Traceback" in capfd.readouterr().err, "the log has it, too"


@pytest.mark.parametrize("how", ["cancelled", "shut down", "cancelled at once"])
@pytest.mark.parametrize("kind", ["hang", "deaf"])
def test_a_start_that_is_stopped_leaves_nothing(how, kind, tmp_path):
    file = tmp_path / "pid"

    async def main():
        child = ChildProcess("the toy engine", "child_engines:FailsToStart", {"kind": kind, "file": str(file)})
        starting = asyncio.ensure_future(child.start())
        if how == "cancelled at once":
            await asyncio.sleep(0)
        else:
            end = time.monotonic() + 10
            while not file.exists() or not file.read_text():
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
        pids = child.processes()
        if how != "shut down":
            starting.cancel()
            await asyncio.wait([starting], timeout=1)
        begin = time.monotonic()
        await child.shutdown(Deadline.after(1))
        assert time.monotonic() - begin < 1.2
        if how == "shut down":
            with pytest.raises(StartError, match="it was shut down"):
                await asyncio.wait_for(starting, 1)
        assert not any(map(alive, pids))
        assert child.processes() == []

    asyncio.run(main())


def test_it_starts_once_and_again_after_a_shutdown():
    async def main():
        child = ChildProcess("the toy engine", "child_engines:Counting")
        for call in (child.check_health(), child.ask("log"), collect(child)):
            with pytest.raises(EngineDeadError, match="the toy engine: it is not started"):
                await call
        await child.shutdown(Deadline.after(1))
        for _ in range(2):
            await child.start()
            with pytest.raises(RuntimeError, match="is started already"):
                await child.start()
            assert await collect(child) == [0, 1, 2, 3, 4]
            await child.shutdown(Deadline.after(5))
            await child.shutdown(Deadline.after(5))
            with pytest.raises(EngineDeadError, match="it was shut down"):
                await collect(child)

    asyncio.run(main())


def test_the_process_is_a_new_interpreter_with_this_ones_environment_and_path(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TOY_VARIABLE", "from the worker")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "somewhere"))

    async def test(child):
        seen = await child.ask("environment", "TOY_VARIABLE")
        assert (seen["variable"], seen["cwd"]) == ("from the worker", str(tmp_path))
        assert str(tmp_path / "somewhere") in seen["path"]
        assert "" not in seen["path"]
        assert str(tmp_path) not in seen["path"], "no module is taken from the current directory"
        assert (await child.ask("environment", "OTHER"))["variable"] == "1"
        assert (await child.ask("environment", "DYNAMO_WORKER_CHILD_FD"))["variable"] is None
        (pid,) = child.processes()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"child_engines:Printing" in command
        assert b"secret" not in command
        assert os.getsid(pid) == pid != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        captured = capfd.readouterr()
        assert "a line on stdout\n" in captured.out, "at once, though stdout is no terminal"
        assert "a line on stderr\n" in captured.err

    run(test, "Printing", {"token": "secret"}, directory=tmp_path, environment={"OTHER": "1"})


# ----------------------------------------------------------------------------------------------------------- shutdown


def test_a_shutdown_ends_requests_and_closes_the_engine(tmp_path):
    closed = tmp_path / "closed"

    async def main():
        async with running(options={"close_file": str(closed)}) as child:
            (pid,) = child.processes()
            task = asyncio.ensure_future(collect(child, count=10**9))
            await asyncio.sleep(0.05)
            begin = time.monotonic()
            await child.shutdown(Deadline.after(10))
            assert time.monotonic() - begin < 2
            with pytest.raises(EngineDeadError, match="it was shut down"):
                await task
            assert not alive(pid)

    asyncio.run(main())
    assert closed.read_text() == "closed\n"


@pytest.mark.parametrize("how", ["deaf", "stopped", "close hangs", "no time"])
def test_a_shutdown_keeps_its_deadline(how, tmp_path):
    closed = tmp_path / "closed"

    async def main():
        options = {"close_hangs": how == "close hangs", "close_file": str(closed)}
        async with running(options=options) as child:
            (pid,) = child.processes()
            if how == "deaf":
                task = asyncio.ensure_future(collect(child, at=1, do="hang"))
                await asyncio.sleep(0.1)
                task.cancel()
            if how == "stopped":
                os.kill(pid, signal.SIGSTOP)
            begin = time.monotonic()
            await child.shutdown(Deadline.after(0.0 if how == "no time" else 0.8))
            seconds = time.monotonic() - begin
            assert seconds < 1.1
            if how in ("deaf", "close hangs"):
                assert seconds > 0.5, "it had its time"
            if how == "stopped":
                assert closed.exists(), "it has ended by itself"
            assert not alive(pid)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["shutdown", "killed", "no time"])
def test_processes_of_its_session_end_with_it(how):
    async def main():
        async with running("LeavesProcesses") as child:
            (pid,), rank = child.processes(), child.info["rank"]
            assert alive(rank)
            if how == "killed":
                os.kill(pid, signal.SIGKILL)
            await child.shutdown(Deadline.after(0.0 if how == "no time" else 5))
            assert not alive(rank)

    asyncio.run(main())


def test_two_shutdowns_at_once():
    async def main():
        async with running() as child:
            await asyncio.gather(child.shutdown(Deadline.after(5)), child.shutdown(Deadline.after(5)))
            assert child.processes() == []

    asyncio.run(main())


def test_it_leaves_no_descriptor_task_or_zombie():
    async def main():
        before = set(os.listdir("/proc/self/fd"))
        async with running() as child:
            await collect(child)
        assert set(os.listdir("/proc/self/fd")) == before
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    asyncio.run(main())


def test_a_process_whose_worker_is_killed_closes_its_engine_and_says_nothing(tmp_path):
    closed = tmp_path / "closed"
    source = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from dynamo_worker.kit.child_process import ChildProcess
async def main():
    child = ChildProcess("toy", "child_engines:Counting", {{"close_file": {str(closed)!r}}})
    info = await child.start()
    print(info["pid"], flush=True)
    async for _ in child.generate("a", {{"count": 10**9}}):
        pass
asyncio.run(main())
"""
    worker = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(worker.stdout.readline())
    worker.kill()
    assert worker.communicate(timeout=10)[1] == b""
    end = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert closed.read_text() == "closed\n"


# ----------------------------------------------------------------------------------------------- programs of any kind

FOREIGN = """
import json, os, socket
connection = socket.socket(fileno=int(os.environ["DYNAMO_WORKER_CHILD_FD"]))
lines = connection.makefile("rw")
def tell(**news):
    lines.write(json.dumps(news) + chr(10))
    lines.flush()
options = json.loads(lines.readline())["start"]
tell(ready={"options": options}, something="new")
for line in lines:
    news = json.loads(line)
    if "add" in news:
        tell(chunks=[news["add"], "a", news["add"], "b"], ended=[])
        tell(chunks=[news["add"], news["payload"], 77, "of nobody"], ended=[news["add"], 77])
        tell(chunks=[news["add"], "after its end"], ended=[])
    if "ping" in news:
        tell(answer=news["ping"])
"""


def test_a_program_that_speaks_the_protocol():
    async def main():
        child = ChildProcess("the foreign engine", [sys.executable, "-c", FOREIGN], {"x": 1})
        assert await child.start() == {"options": {"x": 1}}
        assert [chunk async for chunk in child.generate("a", "payload")] == ["a", "b", "payload"]
        await child.check_health()
        await child.shutdown(Deadline.after(5))

    asyncio.run(main())


def test_a_message_that_arrives_byte_by_byte():
    source = FOREIGN.replace(
        "    lines.write(json.dumps(news) + chr(10))\n    lines.flush()",
        "    [connection.sendall(bytes([byte])) for byte in (json.dumps(news) + chr(10)).encode()]",
    )
    assert "byte" in source

    async def main():
        child = ChildProcess("the foreign engine", [sys.executable, "-c", source], {"x": "ü"})
        assert await child.start() == {"options": {"x": "ü"}}
        assert [chunk async for chunk in child.generate("a", "x" * 5000)] == ["a", "b", "x" * 5000]
        await child.shutdown(Deadline.after(5))

    asyncio.run(main())


def test_the_options_need_not_fit_a_command_line():
    async def test(child):
        assert len(json.dumps(child.info)) > 1_000_000

    run(test, options={"info": {"long": "x" * 1_000_000}})


# ---------------------------------------------------------------------------------------------- engines of coroutines


def test_tasks_answer_and_are_cancelled():
    async def test(child):
        assert child.info == {"options": {"x": 1}}
        answers = await asyncio.gather(*(collect(child, str(number), count=number) for number in range(1, 30)))
        assert answers == [list(range(number)) for number in range(1, 30)]
        leaving = asyncio.ensure_future(collect(child, "leaving", count=10**9))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: _logged(child, "cancelled leaving"))
        assert await collect(child, "leaving") == [0, 1, 2, 3, 4]
        await child.check_health()
        with pytest.raises(RuntimeError, match="unknown question"):
            await child.ask("nonsense")

    run(test, "CountingTasks", {"x": 1})


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"refuse": "temperature"}, InvalidRequestError, "^refused: temperature$"),
        ({"at": 2, "do": "raise"}, RuntimeError, "ArithmeticError: the step fails"),
        ({"at": 2, "do": "unsendable"}, RuntimeError, "cannot be written as JSON: TypeError"),
        ({"at": 2, "do": "huge"}, RuntimeError, "a chunk has .* bytes"),
        ({"at": 2, "do": "swallow", "count": 10**9}, asyncio.TimeoutError, None),
    ],
)
def test_a_task_that_fails_ends_no_other(payload, error, message):
    async def test(child):
        other = asyncio.ensure_future(collect(child, "other", count=100))
        with pytest.raises(error, match=message):
            await asyncio.wait_for(collect(child, "bad", **payload), 10 if message else 0.5)
        assert await other == list(range(100))
        # Not even one that swallows its cancellation sends anything to the next request with its id.
        assert await collect(child, "bad") == [0, 1, 2, 3, 4]

    run(test, "CountingTasks", most_bytes=1 << 16)


def test_the_abort_of_a_task_ends_no_later_one_of_its_id():
    """A request that migrates away and back finds its own abort on the way."""

    async def test(child):
        for _ in range(3):
            stream = child.generate("same", {"count": 10**9})
            await stream.__anext__()
            await stream.aclose()
            assert await collect(child, "same", count=10) == list(range(10))
        # Aborted before their coroutines have begun.
        for _ in range(3):
            leaving = asyncio.ensure_future(collect(child, "same", count=10**9))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
            assert await collect(child, "same", count=10) == list(range(10))

    run(test, "AbortsLater")


def test_an_id_looks_like_that_of_another_request():
    """Clients choose them: this one is what the second of two equal ids becomes."""

    async def test(child):
        held = [child.generate(name, {"count": 10**9}) for name in ("x#3", "x", "x")]
        for stream in held:
            await stream.__anext__()
        assert len(await child.ask("counts")) == 3
        assert [(await stream.__anext__())["count"] for stream in held] == [1, 1, 1]
        for stream in held:
            await stream.aclose()

    run(test)


def test_a_slow_client_holds_up_its_own_task_only():
    async def test(child):
        slow = child.generate("slow", {"count": 300, "filler": 5000})
        assert (await slow.__anext__())["count"] == 0
        made = -1
        while made != (made := (await child.ask("made"))["slow"]):
            await asyncio.sleep(0.1)
        assert made < 250
        assert await collect(child, "quick", count=100) == list(range(100))
        assert [chunk["count"] async for chunk in slow] == list(range(1, 300))

    run(test, "CountingTasks")


def test_a_task_that_never_waits_leaves_room_for_others():
    async def test(child):
        busy = child.generate("busy", {"count": 10**9, "busy": True})
        await busy.__anext__()
        assert await collect(child, "other") == [0, 1, 2, 3, 4]
        await busy.aclose()
        await until(lambda: _logged(child, "cancelled busy"))

    run(test, "CountingTasks")


@pytest.mark.parametrize("how", ["shutdown", "SIGTERM", "busy", "no request", "stubborn"])
def test_tasks_end_in_order(how, tmp_path, capfd):
    closed = tmp_path / "closed"

    async def main():
        async with running("CountingTasks", {"close_file": str(closed)}) as child:
            (pid,) = child.processes()
            do = {"stubborn": {"at": 0, "do": "swallow"}, "busy": {"busy": True}}.get(how, {})
            if how != "no request":
                task = asyncio.ensure_future(collect(child, count=10**9, **do))
                await asyncio.sleep(0.1)
            if how == "SIGTERM":
                os.kill(pid, signal.SIGTERM)
                with pytest.raises(EngineDeadError, match="its process has exited with code 0"):
                    await asyncio.wait_for(task, 5)
            begin = time.monotonic()
            await child.shutdown(Deadline.after(1))
            assert time.monotonic() - begin < 1.2
            assert not alive(pid)
            if how in ("shutdown", "busy"):
                with pytest.raises(EngineDeadError):
                    await task
            if how == "stubborn":
                task.cancel()

    asyncio.run(main())
    if how != "stubborn":
        assert closed.read_text() == "closed\n"
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["raise", "hang", "block"])
def test_a_start_of_tasks_fails_or_is_stopped(kind, tmp_path):
    async def main():
        child = ChildProcess("the toy engine", "child_engines:CountingTasks", {"start": kind})
        starting = asyncio.ensure_future(child.start())
        if kind == "raise":
            with pytest.raises(StartError, match="RuntimeError: no GPU is visible"):
                await starting
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        await child.shutdown(Deadline.after(5))
        assert time.monotonic() - begin < 2
        if kind != "raise":
            with pytest.raises(StartError, match="it was shut down"):
                await starting

    asyncio.run(main())
