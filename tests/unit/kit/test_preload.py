"""Processes that stand by become what multiprocessing spawns, or begin anew where that could make a difference."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_worker.kit import preload
from dynamo_worker.kit.preload import Level
from dynamo_worker.testing import eventually

SPAWN = multiprocessing.get_context("spawn")
#: A module that nothing imports by itself: whoever has it has stood by.
TELLTALE = "colorsys"


def about_me(answer) -> None:
    """Tell what this process is; runs in the spawned process."""
    answer.put(
        {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "stood_by": TELLTALE in sys.modules,
            "variable": os.environ.get("STANDBY_TEST"),
            "directory": os.getcwd(),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "name": multiprocessing.current_process().name,
        }
    )


def about_my_child(answer) -> None:
    answer.put({**ask(about_me), "by": os.getpid()})


def ask(function) -> dict:
    answer = SPAWN.Queue()
    process = SPAWN.Process(target=function, args=(answer,), name="asked")
    process.start()
    told = answer.get(timeout=30)
    process.join(30)
    assert process.exitcode == 0
    assert process.pid is not None
    return {**told, "process": process.pid}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    original = multiprocessing.util.spawnv_passfds
    yield
    preload.dismiss()
    multiprocessing.util.spawnv_passfds = original


def waiting() -> list[int]:
    return [one.pid for one in preload._waiting]


def state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_a_spawned_process_is_the_one_that_stood_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STANDBY_TEST", raising=False)
    preload.prepare([Level((TELLTALE,))], {"STANDBY_TEST"})
    (pid,) = waiting()
    monkeypatch.setenv("STANDBY_TEST", "late")
    told = ask(about_me)
    assert told["process"] == told["pid"] == pid
    assert told["parent"] == os.getpid()
    assert told["stood_by"]
    assert told["variable"] == "late", "what has changed since arrives"
    assert told["name"] == "asked"
    assert not waiting()


def test_a_variable_that_imports_may_have_read_makes_it_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STANDBY_TEST", raising=False)
    preload.prepare([Level((TELLTALE,))], ())
    (pid,) = waiting()
    monkeypatch.setenv("STANDBY_TEST", "late")
    told = ask(about_me)
    assert told["pid"] == pid, "the same process"
    assert not told["stood_by"], "with nothing imported"
    assert told["variable"] == "late"


def test_a_variable_that_will_be_set_is_set_for_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STANDBY_TEST", raising=False)
    preload.prepare([Level((TELLTALE,), count=2)], (), expected={"STANDBY_TEST": "late"})
    monkeypatch.setenv("STANDBY_TEST", "late")
    assert ask(about_me)["stood_by"]
    monkeypatch.setenv("STANDBY_TEST", "something else")
    told = ask(about_me)
    assert not told["stood_by"]
    assert told["variable"] == "something else"


def test_what_is_set_already_is_expected_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDBY_TEST", "early")
    preload.prepare([Level((TELLTALE,))], (), expected={"STANDBY_TEST": "late"})
    assert ask(about_me)["stood_by"]


@pytest.mark.parametrize(("reader", "stood_by"), [("no_such_module", True), (TELLTALE, False)])
def test_a_variable_may_change_until_its_reader_is_imported(
    monkeypatch: pytest.MonkeyPatch, reader: str, stood_by: bool
) -> None:
    monkeypatch.delenv("STANDBY_TEST", raising=False)
    preload.prepare([Level((TELLTALE,))], (), readers={"STANDBY_TEST": reader})
    monkeypatch.setenv("STANDBY_TEST", "late")
    told = ask(about_me)
    assert told["stood_by"] is stood_by
    assert told["variable"] == "late"


def test_a_resource_limit_makes_it_begin_anew() -> None:
    preload.prepare([Level((TELLTALE,))], ())
    (pid,) = waiting()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        told = ask(about_me)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert told["pid"] == pid
    assert not told["stood_by"]
    assert told["files"] == soft - 1


def test_another_program_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines put a program in front that binds the process to memory and cores."""
    preload.prepare([Level((TELLTALE,))], ())
    (pid,) = waiting()
    program = tmp_path / "bound"
    program.write_text(f'#!/bin/sh\nSTANDBY_TEST=bound exec {sys.executable} "$@"\n')
    program.chmod(0o700)
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(program))
    told = ask(about_me)
    assert told["pid"] == pid
    assert not told["stood_by"]
    assert told["variable"] == "bound"


def test_descriptors_of_any_number_arrive() -> None:
    preload.prepare([Level(())], ())
    (pid,) = waiting()
    occupied = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]  # the queue's descriptors get high numbers
    try:
        assert ask(about_me)["pid"] == pid
    finally:
        for descriptor in occupied:
            os.close(descriptor)


def test_it_goes_where_its_parent_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    preload.prepare([Level(())], ())
    monkeypatch.chdir(tmp_path)
    assert ask(about_me)["directory"] == str(tmp_path)


def test_children_of_children() -> None:
    preload.prepare([Level(()), Level((TELLTALE,))], ())
    told = ask(about_my_child)
    assert told["stood_by"]
    assert told["parent"] == told["by"]


def test_as_many_as_wanted_and_then_as_ever() -> None:
    preload.prepare([Level((TELLTALE,), count=2)], ())
    assert [ask(about_me)["stood_by"] for _ in range(3)] == [True, True, False]


def test_what_cannot_be_imported_is_left_to_the_process() -> None:
    preload.prepare([Level(("no_such_module_at_all", TELLTALE))], ())
    assert ask(about_me)["stood_by"]


def test_one_that_has_died_is_not_asked() -> None:
    preload.prepare([Level((TELLTALE,))], ())
    (pid,) = waiting()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: state(pid) == "Z", 5, "its end")
    told = ask(about_me)
    assert told["pid"] != pid
    os.waitpid(pid, 0)


def test_what_is_not_needed_ends() -> None:
    preload.prepare([Level((), count=2)], ())
    pids = waiting()
    preload.dismiss()
    assert [state(pid) for pid in pids] == ["gone", "gone"]


def test_nobody_stays_behind_a_parent_that_is_killed() -> None:
    code = """
    import os, signal
    from dynamo_worker.kit import preload
    preload.prepare([preload.Level(()), preload.Level(())], ())
    print(*(one.pid for one in preload._waiting), flush=True)
    import time; time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert parent.wait(20) == -signal.SIGKILL
    eventually(lambda: state(pid) in ("gone", "Z"), 10, "the end of the one that stood by")


def test_without_patience_it_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from dynamo_worker.kit import preload\n"
        "preload._PATIENCE = 0.1\n"
        "import socket\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.sendall((2).to_bytes(8, 'big') + b'{}')\n"
        f"preload.main(theirs.detach(), {json.dumps([[{'modules': [], 'count': 1}], [], {}])!r})\n"
        "raise SystemExit(5)\n"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0
    assert time.monotonic() - started < 15


def test_other_programs_are_started_as_ever() -> None:
    preload.prepare([Level(())], ())
    tracker = multiprocessing.util.spawnv_passfds(b"/bin/sh", [b"/bin/sh", b"-c", b"exit 7"], [])
    assert os.waitstatus_to_exitcode(os.waitpid(tracker, 0)[1]) == 7
    assert len(waiting()) == 1
