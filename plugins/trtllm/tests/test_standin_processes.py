"""The stand-in of `tensorrt_llm`: its processes, how they die, and how the main process learns of it.

Every test runs programs of its own: what dies here takes its process with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

PRELUDE = """
import asyncio, json, os, signal, sys, threading, time
from tensorrt_llm import LLM, SamplingParams, faults
from tensorrt_llm.executor import EngineDeadError, RequestError

def say(**facts):
    print(json.dumps(facts), flush=True)

def make(**arguments):
    llm = LLM("none", skip_tokenizer_init=True, enable_iter_perf_stats=True, **arguments)
    ranks = [each.pid for each in sorted(llm._executor._worker_process_monitor._watched.values())]
    say(main=os.getpid(), ranks=ranks)
    return llm

def stream(llm, *prompt, tokens=1500):
    params = SamplingParams(end_id=2, ignore_eos=True, detokenize=False, max_tokens=tokens)
    return llm.generate_async(list(prompt) or [5, 6, 7, 8], params, streaming=True)

async def outcome(output):
    try:
        async for _ in output:
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return output.outputs[0].finish_reason

async def first_token(output):
    await output.__anext__()
    return output

def wait_for(condition, timeout=20):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.01)
    return timeout - (until - time.monotonic())
"""


class Program:
    """A running program, what it says, and the processes that belong to it."""

    def __init__(self, path: Path, code: str, command: tuple[str, ...] = (), **environment: str) -> None:
        path.write_text(PRELUDE + textwrap.dedent(code))
        self.errors = (path.parent / "errors").open("w+")
        self.process = subprocess.Popen(
            [*command, sys.executable, str(path)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.pids: set[int] = {self.process.pid}
        self.said: queue.Queue[dict[str, object] | None] = queue.Queue()
        self.listener = threading.Thread(target=self.listen)
        self.listener.start()

    def listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.put(json.loads(line))
        self.said.put(None)

    def hear(self, name: str, timeout: float = 30) -> object:
        """Wait for the program to say something about `name`."""
        until = time.monotonic() + timeout
        said = []
        with contextlib.suppress(queue.Empty):
            while (facts := self.said.get(timeout=max(until - time.monotonic(), 0))) is not None:
                said.append(facts)
                if name in facts:
                    return facts[name]
        self.errors.seek(0)
        raise AssertionError(f"no word of {name}, only {said}: {self.errors.read()[-4000:]}")

    def ready(self) -> list[int]:
        """Wait for the engine; return the pids of its ranks."""
        ranks = self.hear("ranks")
        self.pids |= {*ranks, parent(ranks[0])}
        return ranks

    def gone(self, timeout: float, *pids: int) -> None:
        """Wait for the end of these processes, or of all; raise AssertionError if one stays."""
        pids = pids or tuple(self.pids)
        until = time.monotonic() + timeout
        while any(map(alive, pids)):
            self.process.poll()
            assert time.monotonic() < until, f"still there after {timeout} s: {[pid for pid in pids if alive(pid)]}"
            time.sleep(0.02)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def run(tmp_path):
    programs = []

    def start(code: str, *command: str, **environment: str) -> Program:
        environment.setdefault("TLLM_STANDIN_LOAD_SECONDS", "0")
        path = tmp_path / str(len(programs))
        path.mkdir()
        programs.append(Program(path / "program.py", code, command, **environment))
        return programs[-1]

    yield start
    for program in programs:
        for pid in program.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.process.wait(10)
        program.gone(10)
        program.listener.join(10)
        program.process.stdout.close()
        program.errors.close()


@pytest.fixture
def folder():
    """A temporary folder with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t") as name:
        yield Path(name)


def test_orderly_end(run, folder):
    """Two ranks: tokens, abort, calls, statistics, and a shutdown after which no process is there."""
    program = run(
        """
        async def main():
            with make(tensor_parallel_size=2, kv_cache_config={"event_buffer_max_size": 100}) as llm:
                output = stream(llm, *range(3, 67), tokens=5)
                lengths = [len(step.outputs[0].token_ids) async for step in output]
                say(lengths=lengths, reason=output.outputs[0].finish_reason)
                output = await first_token(stream(llm))
                output.abort()
                say(aborted=await outcome(output), seen=len(output.outputs[0].token_ids))
                say(stats=[each["numActiveRequests"] async for each in llm.get_stats_async(0.1)][-1])
                say(events=[each["data"]["type"] async for each in llm.get_kv_cache_events_async(0.1)])
                say(called=llm._collective_rpc("reset_prefix_cache"), healthy=llm._check_health())
            llm.shutdown()
            try:
                stream(llm)
            except RuntimeError as error:
                say(refused=str(error))
        if __name__ == "__main__":
            asyncio.run(main())
        """,
        TMPDIR=str(folder),
    )
    program.ready()
    assert program.hear("lengths") == [1, 2, 3, 4, 5]
    assert program.hear("aborted") == "cancelled"
    assert program.hear("stats") == 0
    assert program.hear("events")[:2] == ["created", "stored"]
    assert program.hear("called") == [None, None]
    assert program.hear("refused") == "LLM is shutting down"
    assert program.process.wait(20) == 0
    program.gone(10)
    assert len(list(folder.glob("rpc_test_*"))) == 1  # libzmq never removes the file of a named socket


SLEEPING = """
if __name__ == "__main__":
    llm = make(tensor_parallel_size=2)
    time.sleep(60)
"""


def test_ranks_go_with_the_main_process(run):
    program = run(SLEEPING)
    program.ready()
    program.process.kill()
    program.gone(6)


def test_ranks_stay_while_a_forked_child_holds_the_pipe(run):
    program = run(SLEEPING, TLLM_STANDIN_FORK_HOLDER_SECONDS="4")
    ranks = program.ready()
    program.process.kill()
    program.process.wait()
    time.sleep(2)
    assert alive(ranks[0])
    program.gone(8)


DEATH = """
async def main():
    llm = make(tensor_parallel_size=2)
    other = await first_token(stream(llm))
    broken = stream(llm, *faults.trigger({kind!r}, rank={rank}))
    began = time.monotonic()
    say(outcome=await outcome(other), took=time.monotonic() - began)
    say(again=await outcome(other))
    say(futures=[future.done() for future in llm._executor.mpi_futures])
    wait_for(lambda: llm._executor._fatal_error is not None)
    say(fatal=str(llm._executor._fatal_error), healthy=llm._check_health())
    try:
        llm._executor.submit(None)
    except EngineDeadError as error:
        say(refused=str(error))
    sys.stdin.read()
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(("kind", "rank"), [("kill", 1), ("abort", 0), ("raise", 1), ("hang", 1)])
def test_death_while_busy(run, kind, rank):
    """Ranks that die without a word: the futures stay pending, the process monitor finds it, every request fails."""
    program = run(
        DEATH.format(kind=kind, rank=rank), TLLM_RANK_CRASH_HARD_KILL_GRACE="1", TLLM_HANG_DETECTION_TIMEOUT_S="1"
    )
    ranks = program.ready()
    text = program.hear("outcome")
    assert text.startswith("EngineDeadError: Engine has died: rank ")
    assert program.hear("again") == text
    assert program.hear("futures") == [False, False]
    assert program.hear("fatal").endswith("exited unexpectedly")
    assert "Engine has died" in program.hear("refused")
    program.gone(5, *ranks)
    assert program.process.poll() is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [("fatal", "device-side assert"), ("return", "MPI worker exited unexpectedly")],
)
def test_task_of_the_rank_ends(run, kind, text):
    """The future completes, with or without an exception; both are fatal."""
    program = run(
        f"""
        async def main():
            llm = make()
            other = await first_token(stream(llm))
            stream(llm, *faults.trigger({kind!r}))
            say(outcome=await outcome(other))
            wait_for(lambda: llm._executor._fatal_error is not None)
            say(fatal=str(llm._executor._fatal_error))
            llm.shutdown()
            say(down=True)
        if __name__ == "__main__":
            asyncio.run(main())
        """
    )
    program.ready()
    assert text in program.hear("outcome")
    assert text in program.hear("fatal")
    program.process.wait(25)
    program.gone(10)


# libzmq aborts the process now and then: the blocked abort and the shutdown use one socket, as in the real package.
@pytest.mark.slow
def test_idle_death_and_shutdown_of_a_dead_engine(run):
    program = run(
        """
        async def main():
            llm = make()
            await outcome(stream(llm, tokens=2))
            pending = stream(llm)
            say(killed=os.kill(next(iter(llm._executor._worker_process_monitor._watched.values())).pid, 9))
            blocked = threading.Thread(target=pending.abort, daemon=True)
            say(noticed=wait_for(lambda: llm._executor._fatal_error is not None))
            blocked.start()
            blocked.join(0.5)
            say(blocked=blocked.is_alive(), doing_shutdown=llm._executor.doing_shutdown)
            began = time.monotonic()
            try:
                llm.shutdown()
            finally:
                say(down=time.monotonic() - began)
        if __name__ == "__main__":
            asyncio.run(main())
        """
    )
    program.ready()
    assert program.hear("noticed") < 2
    assert program.hear("blocked")
    assert 9 < program.hear("down") < 13
    program.process.wait(20)
    program.gone(10)


def test_errors_of_one_request(run):
    """A RequestError spares the others; one whose text tells of a dead device does not change the health either."""
    program = run(
        """
        async def main():
            llm = make()
            other = await first_token(stream(llm))
            say(failed=await outcome(stream(llm, *faults.trigger("request_error"))))
            deaf = await first_token(stream(llm, *faults.trigger("ignore_abort"), 5, 6, 7))
            deaf.abort()
            await asyncio.sleep(0.3)
            say(deaf=not deaf.finished and not other.finished)
            await outcome(stream(llm, *faults.trigger("silent_stats"), tokens=1))
            say(silent=[each async for each in llm.get_stats_async(0.1)])
            say(cuda=await outcome(stream(llm, *faults.trigger("cuda_error"))), other=await outcome(other))
            say(later=await outcome(stream(llm)), healthy=llm._check_health())
            say(exception=await outcome(stream(llm, *faults.trigger("request_exception"))))
        if __name__ == "__main__":
            asyncio.run(main())
        """
    )
    program.ready()
    assert program.hear("failed") == "RequestError: stand-in: this request fails"
    assert program.hear("deaf")
    assert program.hear("silent") == []
    assert "illegal memory access" in program.hear("cuda")
    assert program.hear("healthy")
    assert program.process.wait(20) == 0


def test_shutdown_that_never_returns(run):
    program = run(
        """
        if __name__ == "__main__":
            llm = make()
            thread = threading.Thread(target=llm.shutdown, daemon=True)
            thread.start()
            thread.join(1)
            say(stuck=thread.is_alive())
            os._exit(7)
        """,
        TLLM_STANDIN_IGNORE_STOP="1",
    )
    program.ready()
    assert program.hear("stuck")
    assert program.process.wait(5) == 7
    program.gone(6)


def test_orted_killed(run):
    program = run(SLEEPING)
    ranks = program.ready()
    os.kill(parent(ranks[0]), signal.SIGKILL)
    assert program.process.wait(6) == 205
    program.gone(6)


@pytest.mark.parametrize(
    ("fault", "tp", "text"),
    [
        ("kill@load", 1, "Executor worker died during initialization"),
        ("raise@load:1", 2, "Executor worker died during initialization"),
        ("raise@load", 2, "Executor worker returned error"),
    ],
)
def test_death_while_loading(run, fault, tp, text):
    """The constructor raises soon, and the process can end."""
    program = run(
        f"""
        if __name__ == "__main__":
            try:
                make(tensor_parallel_size={tp})
            except RuntimeError as error:
                say(error=str(error), cause=str(error.__cause__))
        """,
        TLLM_STANDIN_FAULT=fault,
    )
    assert program.hear("error") == text
    assert program.process.wait(20) == 0


def test_uncaught_exception_shuts_down(run):
    program = run(
        """
        if __name__ == "__main__":
            llm = make()
            raise KeyError("unexpected")
        """
    )
    program.ready()
    assert program.process.wait(20) == 1
    program.gone(5)


LAUNCHED = """
async def main():
    llm = make(tensor_parallel_size=2)
    key = os.environ.get("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY")
    say(session=[type(llm.mpi_session).__name__, llm._executor.mpi_futures, key])
    output = stream(llm, tokens=4)
    say(outcome=await outcome(output), tokens=len(output.outputs[0].token_ids))
    {then}
    llm.shutdown()
if __name__ == "__main__":
    asyncio.run(main())
    raise SystemExit(3)
"""


def launch(run, then: str, **environment: str) -> Program:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment |= {
        "OPAL_PREFIX": str(Path(mpirun).resolve().parent.parent),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = (mpirun, "--oversubscribe", "-n", "2", str(Path(sys.executable).parent / "trtllm-llmapi-launch"))
    program = run(LAUNCHED.format(then=then), *command, **environment)
    program.pids.add(program.hear("main"))
    assert program.hear("session") == ["RemoteMpiCommSessionClient", [], None]
    assert program.hear("outcome") == "length"
    return program


def test_launcher(run):
    """The ranks are mpirun's; the command's status becomes mpirun's, and all end."""
    program = launch(run, "")
    assert program.process.wait(30) == 3
    program.gone(5)


@pytest.mark.parametrize(("victim", "old"), [("mpirun", False), ("rank", False), ("mpirun", True)])
def test_launcher_guards_the_command(run, victim, old):
    """The end of mpirun or a rank ends the command, too; without the guard of newer releases it outlives mpirun."""
    program = launch(
        run,
        """stream(llm, *(faults.trigger("kill", rank=1) if os.environ["VICTIM"] == "rank" else [3]))
    say(waiting=True)
    time.sleep(60)""",
        VICTIM=victim,
        TLLM_STANDIN_OLD_LAUNCHER=str(int(old)),
    )
    program.hear("waiting")
    if victim == "mpirun":
        program.process.kill()
    program.process.wait(15)
    main = next(pid for pid in program.pids if pid != program.process.pid)
    if old:
        time.sleep(3)
        assert alive(main)
    else:
        program.gone(12, main)


def test_launcher_reports_a_failed_rank(run):
    program = launch(
        run,
        """say(died=await outcome(stream(llm, *faults.trigger("raise"))))
    wait_for(lambda: llm._executor._fatal_error is not None)
    say(fatal=str(llm._executor._fatal_error))
    os._exit(4)""",
    )
    assert "loop crashed" in program.hear("fatal")
