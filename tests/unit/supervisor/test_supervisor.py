"""The supervisor's policy, on real processes: signals, deadlines, heartbeats, exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import NOISE, state_of, wait_until

SETTINGS = 'settings={"engine":"fake","termination_grace_period":%s,"heartbeat_timeout":%s}'
SERVING = "state=SERVING"


class TestWorkerEndsByItself:
    def test_its_exit_code_and_reason_are_passed_on(self, supervised):
        supervised.start("exit-message=3:port 8000 is in use", "exit=3")
        assert supervised.wait() == 3
        assert 'Worker stopped code=3 reason="port 8000 is in use"' in supervised.text

    @pytest.mark.parametrize("code", [1, 2, 7, 9, 126, 127, 250])
    @pytest.mark.parametrize(("steps", "documented"), [((), 3), ((SERVING,), 1)], ids=["during start", "serving"])
    def test_an_exit_code_of_a_plugins_own_becomes_a_documented_one(self, supervised, code, steps, documented):
        supervised.start(*steps, f"exit={code}")
        assert supervised.wait() == (2 if code == 2 and not steps else documented)
        assert f'reason="worker exited with code {code}"' in supervised.text

    def test_the_worker_may_say_that_a_signal_ended_it(self, supervised):
        supervised.start(SERVING, "exit=143")
        assert supervised.wait() == 143

    @pytest.mark.parametrize(("steps", "code"), [((), 3), ((SERVING,), 1)], ids=["during start", "serving"])
    def test_unsolicited_exit_code_0_is_a_failure(self, supervised, steps, code):
        supervised.start(*steps, "exit=0")
        assert supervised.wait() == code
        assert "without being asked to stop" in supervised.text

    def test_exit_code_0_after_a_stop_the_worker_was_told_of_directly(self, supervised):
        supervised.start(SERVING, "state=DRAINING@9", "exit=0")
        assert supervised.wait() == 0

    def test_a_signal_behind_its_end_does_not_make_it_a_stop(self, supervised, tmp_path):
        """The guardian is stopped, so that there is a moment for it."""
        go = tmp_path / "go"
        supervised.start(SERVING, "arrived", f"await={go}", "exit=0")
        worker = supervised.worker
        os.kill(supervised.guardian, signal.SIGSTOP)
        go.touch()
        wait_until(lambda: state_of(worker) == "Z")
        time.sleep(0.1)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1
        assert "without being asked to stop" in supervised.text
        assert "cleaning up; another one leaves at once" in supervised.text

    def test_exit_code_0_in_spite_of_a_fatal_error_is_a_failure(self, supervised):
        supervised.start(SERVING, "exit-message=1:engine died", "exit=0")
        assert supervised.wait() == 1
        assert 'reason="engine died"' in supervised.text

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
    def test_death_by_signal(self, supervised, number):
        supervised.start(SERVING, f"die={int(number)}")
        assert supervised.wait() == 128 + number
        assert f"killed by {number.name}" in supervised.text

    def test_death_by_sigkill_names_memory(self, supervised):
        supervised.start(SERVING, "die=9")
        assert supervised.wait() == 137
        assert "memory" in supervised.text

    def test_command_that_does_not_exist(self, supervised):
        supervised.start(worker="/nonexistent", executable=None)
        assert supervised.wait() == 2  # python itself says so
        program = (
            "import sys; from dynamo_worker.supervisor import supervise; sys.exit(supervise([], command=sys.argv[1:]))"
        )
        for command in ("/nonexistent/x", "/etc/passwd"):
            done = subprocess.run(
                [sys.executable, "-c", program, command], env=supervised.environment, capture_output=True, text=True
            )
            assert done.returncode == 3
            assert f"cannot execute '{command}'" in done.stderr

    def test_no_place_for_the_run_directory(self, supervised):
        supervised.environment["TMPDIR"] = "/proc"
        supervised.tmp.rmdir()
        supervised.start("exit-message=3:x", "exit=3")  # falls back to /tmp, as tempfile does
        assert supervised.wait() == 3


class TestGracefulStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_the_worker_is_told_and_obeys(self, supervised, number):
        supervised.start(SERVING, "arrived", "obey=0")
        supervised.signal(number)
        assert supervised.wait() == 0
        told = json.loads(supervised.text.split("told ")[1].splitlines()[0])
        assert told["type"] == "stop"
        assert told["level"] == 1
        assert told["signal"] == number.name
        assert 0 <= time.monotonic() - told["at"] < 60
        assert f'Received shutdown signal signal={number.name} stop_level=1 next="another one forces' in supervised.text

    def test_idle_stop_is_prompt(self, supervised, measured):
        supervised.start(SERVING, "arrived", "obey=0")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        supervised.wait()
        measured("SIGTERM to exit, obedient worker", time.monotonic() - started, 0.3)

    def test_a_nonzero_code_of_the_worker_wins(self, supervised):
        supervised.start(SERVING, "arrived", "obey=1")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1

    def test_blocked_start(self, supervised, measured):
        supervised.start("arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        measured("SIGTERM during a blocked start", time.monotonic() - started, 3.0)
        assert 'reason="stopped during start"' in supervised.text

    def test_a_start_that_blocks_while_it_is_cleaned_up(self, supervised, measured):
        """It has never served: its cleaning up gets the same 2 s, and no more."""
        supervised.start(SETTINGS % (30, 0), "state=CLEANUP@60", "arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        measured("SIGTERM during a blocked start", time.monotonic() - started, 3.0)
        assert 'reason="stopped during start"' in supervised.text

    def test_the_announced_deadline_is_enforced(self, supervised):
        supervised.start(SETTINGS % (30, 0), SERVING, "arrived", "state=DRAINING@0.5", "hang")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 6
        assert "not stopped by its deadline, killed in state DRAINING" in supervised.text

    def test_a_deadline_beyond_the_grace_period_is_not_believed(self, supervised):
        supervised.start(SETTINGS % (3, 0), SERVING, "state=DRAINING@500", "arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 6
        assert 0.9 < time.monotonic() - started < 3 * NOISE

    def test_fallback_deadline_while_none_is_announced(self, supervised):
        supervised.start(SETTINGS % (3, 0), SERVING, "arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 6
        assert 0.9 < time.monotonic() - started < 3 * NOISE

    def test_a_worker_that_announces_a_fatal_error_and_hangs(self, supervised):
        supervised.start(SERVING, "state=FATAL@0.3", "hang")
        assert supervised.wait() == 1
        assert "killed at its deadline" in supervised.text

    def test_grace_period_from_the_environment_before_the_worker_speaks(self, supervised):
        supervised.environment["DYN_WORKER_TERMINATION_GRACE_PERIOD"] = "2.5"
        supervised.start(SERVING, "arrived", "hang")
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 6
        assert time.monotonic() - started < 2.5 * NOISE

    def test_signal_right_at_the_start(self, supervised):
        supervised.start("obey=0")
        wait_until(lambda: supervised.run_directories, what="supervisor up")
        supervised.signal(signal.SIGTERM)
        code = supervised.wait()
        assert code in (0, 143)  # 143: it came before the first line of our code

    def test_signals_that_were_ignored_stay_ignored(self, supervised):
        def ignore():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        supervised.start(SERVING, "arrived", "obey=0", preexec_fn=ignore)
        supervised.signal(signal.SIGINT)
        supervised.signal(signal.SIGHUP)
        time.sleep(0.3)
        assert supervised.process.poll() is None
        assert "Received" not in supervised.text
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    @pytest.mark.parametrize(
        "numbers",
        [
            (signal.SIGINT, signal.SIGINT, signal.SIGINT),
            (signal.SIGTERM, signal.SIGHUP),  # systemd with SendSIGHUP=yes
            (signal.SIGHUP, signal.SIGTERM, signal.SIGINT),
        ],
        ids=lambda numbers: "+".join(number.name for number in numbers),
    )
    def test_signals_that_come_together_count_once(self, supervised, numbers):
        supervised.start(SERVING, "arrived", "obey-slowly=0:0.5")
        supervised.signal(signal.SIGSTOP)  # so that they are there at the same time, however slow this machine is
        for number in numbers:
            supervised.signal(number)
        supervised.signal(signal.SIGCONT)
        assert supervised.wait() == 0
        assert supervised.text.count("Received shutdown signal") == 1

    def test_a_signal_in_its_last_moments_does_not_change_the_code(self, supervised):
        """The interpreter gives signals their default actions back when it ends; so it must not come to that."""
        supervised.patch("""
            import atexit, os, signal
            def end():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            if "DYNAMO_WORKER_CONTROL_FD" not in os.environ:
                atexit.register(end)
        """)
        supervised.start(SERVING, "arrived", "obey=0")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_flags_after_two_dashes_belong_to_the_engine(self, supervised):
        supervised.start(SERVING, "arrived", "obey=0", "--", "--log-format=json", "--termination-grace-period", "1")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        assert "INFO dynamo_worker.supervisor: Worker started" in supervised.text
        assert supervised.events() == []


class TestForcedStop:
    def test_second_signal(self, supervised, measured):
        supervised.start(SERVING, "child=stubborn.py", "arrived", "hang")
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        time.sleep(0.11)
        started = time.monotonic()
        supervised.signal(signal.SIGINT)
        assert supervised.wait() == 130
        measured("second signal to exit", time.monotonic() - started, 2.5)
        assert 'next="another one kills at once"' in supervised.text

    def test_third_signal(self, supervised, measured):
        supervised.start(SERVING, "child=stubborn.py", "arrived", "hang")
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        time.sleep(0.11)
        supervised.signal(signal.SIGINT)
        wait_until(lambda: "level=2" in supervised.text)
        time.sleep(0.11)
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 143
        measured("third signal to exit", time.monotonic() - started, 0.5)
        supervised.gone()

    def test_the_worker_is_told_to_hurry(self, supervised):
        """It gets both requests, and the second one says so; what it returns in time does not matter any more."""
        supervised.start(SERVING, "arrived", "hear=2", "exit=0")
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: supervised.text.count("told ") == 1)
        time.sleep(0.11)
        supervised.signal(signal.SIGINT)
        assert supervised.wait() == 130
        told = [json.loads(line.partition("told ")[2]) for line in supervised.text.splitlines() if "told {" in line]
        assert [(stop["level"], stop["signal"]) for stop in told] == [(1, "SIGTERM"), (2, "SIGINT")]
        assert told[0]["at"] < told[1]["at"]

    def test_sigquit_forces_and_dumps(self, supervised):
        supervised.start("dump-on-usr1", SERVING, "arrived", "hang")
        supervised.signal(signal.SIGQUIT)
        assert supervised.wait() == 131
        assert "most recent call first" in supervised.text

    def test_sigquit_right_behind_another_signal_counts(self, supervised):
        supervised.start(SERVING, "arrived", "hang")
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        supervised.signal(signal.SIGQUIT)
        supervised.signal(signal.SIGQUIT)
        assert supervised.wait() == 131
        assert "level=2" in supervised.text
        assert "level=3" not in supervised.text

    def test_the_third_signal_with_a_stopped_guardian(self, supervised, measured):
        supervised.start(SERVING, "child=stubborn.py", "arrived", "hang")
        guardian = supervised.guardian
        os.kill(guardian, signal.SIGSTOP)
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        time.sleep(0.11)
        supervised.signal(signal.SIGINT)
        wait_until(lambda: "level=2" in supervised.text)
        time.sleep(0.11)
        started = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 143
        measured("third signal to exit, guardian stopped", time.monotonic() - started, 0.5)


class TestHeartbeat:
    def test_a_stuck_worker_is_dumped_withdrawn_and_killed(self, supervised):
        root = supervised.base / "discovery"
        steps = (
            SETTINGS % (30, 0.5),
            "dump-on-usr1",
            f"register-file={root}:4ec5c2a6e8130c29",
            SERVING,
            "arrived",
            "hang",
        )
        supervised.start(*steps)
        wait_until(lambda: "event loop is unresponsive" in supervised.text)
        wait_until(lambda: not [path for path in root.rglob("*") if path.is_file()])
        assert supervised.process.poll() is None  # routers first, while the worker writes its dump
        assert supervised.wait() == 1
        assert "most recent call first" in supervised.text
        assert 'reason="event loop unresponsive for' in supervised.text

    def test_without_a_handler_no_signal_is_sent(self, supervised):
        supervised.start(SETTINGS % (30, 0.3), SERVING, "hang")
        assert supervised.wait() == 1
        assert "the worker does not handle SIGUSR1" in supervised.text
        assert "event loop unresponsive" in supervised.text

    @pytest.mark.parametrize("state", ["STARTING", "CLEANUP"])
    def test_a_worker_that_may_block_is_not_watched(self, supervised, state):
        supervised.start(SETTINGS % (30, 0.2), f"state={state}", "arrived", "beat=1:1", "exit-message=4:x", "exit=4")
        assert supervised.wait() == 4

    def test_beats_keep_it_alive(self, supervised):
        supervised.start(SETTINGS % (30, 0.6), SERVING, "beat=0.1:15", "exit-message=3:x", "exit=3")
        assert supervised.wait() == 3

    def test_a_stopped_supervisor_does_not_blame_the_worker(self, supervised):
        supervised.start(SETTINGS % (30, 1.0), SERVING, "arrived", "beat=0.1:40", "exit-message=3:x", "exit=3")
        supervised.signal(signal.SIGSTOP)
        time.sleep(2.0)
        supervised.signal(signal.SIGCONT)
        assert supervised.wait() == 3

    def test_a_wait_longer_than_epoll_can_take(self, supervised):
        supervised.start(SETTINGS % (3000000, 3000000), SERVING, "arrived", "obey-slowly=0:0.5")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_zero_switches_it_off(self, supervised):
        supervised.start(SETTINGS % (30, 0), SERVING, "arrived", "beat=0:1", "obey=0")
        time.sleep(0.5)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_sigusr1_asks_for_a_stack_dump(self, supervised):
        supervised.start("dump-on-usr1", SERVING, "arrived", "obey=0")
        supervised.signal(signal.SIGUSR1)
        wait_until(lambda: "most recent call first" in supervised.text)
        assert supervised.process.poll() is None
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0


class TestControlSocket:
    def test_garbage_is_ignored_and_reported_once(self, supervised):
        supervised.start("garbage", SERVING, "arrived", "obey=0")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        assert supervised.text.count("Ignoring malformed control message") == 1

    def test_a_worker_that_closes_it_is_stopped_by_a_real_signal(self, supervised):
        steps = (SETTINGS % (30, 0.5), "on-term=0", SERVING, "close-control", "arrived", "hang")
        supervised.start(*steps)
        wait_until(lambda: "closed its control socket" in supervised.text)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_a_worker_that_ends_without_having_read_everything(self, supervised):
        """Its farewell counts all the same: a usage error stays one, whatever signal came meanwhile."""
        go = supervised.base / "go"
        supervised.start("arrived", f"await={go}", "exit-message=2:unknown flag --x", "exit=2")
        worker = supervised.worker
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: "level=1" in supervised.text)
        supervised.signal(signal.SIGSTOP)
        go.touch()
        wait_until(lambda: state_of(worker) is None)
        supervised.signal(signal.SIGCONT)
        assert supervised.wait() == 2
        assert 'reason="unknown flag --x"' in supervised.text

    def test_a_worker_that_has_said_farewell_is_not_sent_a_signal(self, supervised):
        supervised.start("exit-message=2:unknown flag --x", "close-control", "arrived", "sleep=0.5", "exit=2")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 2
        assert 'reason="unknown flag --x"' in supervised.text
        assert "reads no control messages" not in supervised.text


class TestWhatTheWorkerInherits:
    def test_environment_session_signals_and_descriptors(self, supervised):
        facts, environment = supervised.base / "facts", supervised.base / "environment"
        supervised.environment |= {"NOTIFY_SOCKET": "/nonexistent", "WATCHDOG_USEC": "1000000", "LOGNAME": "a/b"}
        supervised.environment["XDG_CACHE_HOME"] = str(supervised.base / "cache")
        leaked = os.open("/etc/passwd", os.O_RDONLY)

        def disturb():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

        supervised.start(
            f"environment={environment}", f"inherited={facts}", SERVING, "arrived", "obey=0",
            preexec_fn=disturb, pass_fds=[leaked],
        )  # fmt: skip
        os.close(leaked)
        seen = json.loads(environment.read_text())
        (run_directory,) = supervised.run_directories
        assert seen["DYNAMO_WORKER_RUN_DIR"] == str(run_directory)
        assert seen["TMPDIR"] == str(run_directory / "tmp")
        assert run_directory.stat().st_mode & 0o777 == 0o700
        assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(supervised.base / "cache/dynamo-worker/torchinductor_a_b")
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & seen.keys()
        inherited = json.loads(facts.read_text())
        assert inherited["session"] == inherited["pid"]
        assert set(inherited["descriptors"]) == {"0", "1", "2", seen["DYNAMO_WORKER_CONTROL_FD"]}
        assert int(inherited["status"]["SigBlk"], 16) == 0
        ignored = int(inherited["status"]["SigIgn"], 16)
        assert not ignored >> (signal.SIGTERM - 1) & 1
        assert not ignored >> (signal.SIGUSR2 - 1) & 1
        supervised.signal(signal.SIGINT)  # SIGTERM was ignored at start and stays so
        assert supervised.wait() == 0

    def test_closed_standard_descriptors(self, supervised):
        facts = supervised.base / "facts"
        closing = 'exec "$0" "$@" <&- >&- 2>&-'
        supervised.start(f"inherited={facts}", SERVING, "exit-message=3:x", "exit=3", shell_wrapper=closing)
        assert supervised.wait() == 3
        assert json.loads(facts.read_text())["descriptors"]["2"] == "/dev/null"


class TestReports:
    def test_termination_message(self, supervised):
        supervised.termination_message.write_text("old " * 100)
        supervised.start("exit-message=3:no GPU found", "exit=3")
        supervised.wait()
        assert supervised.reason == "exit code 3: no GPU found"

    def test_termination_message_is_never_created(self, supervised):
        supervised.start("exit=3")
        supervised.wait()
        assert not supervised.termination_message.exists()

    def test_termination_message_path_from_the_settings(self, supervised):
        path = supervised.base / "other"
        path.touch()
        supervised.start(f'settings={{"termination_message_path":"{path}"}}', "exit=3")
        supervised.wait()
        assert path.read_text() == "exit code 3: worker exited with code 3"

    def test_unwritable_termination_message(self, supervised):
        supervised.environment["DYN_WORKER_TERMINATION_MESSAGE_PATH"] = str(supervised.base)
        supervised.start("exit=3")
        assert supervised.wait() == 3
        assert "Termination message not written" in supervised.text

    def test_no_termination_message_through_a_link(self, supervised):
        victim = supervised.base / "victim"
        victim.write_text("precious")
        supervised.termination_message.symlink_to(victim)
        supervised.start("exit=3")
        assert supervised.wait() == 3
        assert victim.read_text() == "precious"
        assert "Termination message not written" in supervised.text

    @pytest.mark.parametrize("abstract", [False, True])
    def test_sd_notify(self, supervised, abstract):
        address = f"\0dwtest-{os.getpid()}" if abstract else str(supervised.base / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(address)
            listener.settimeout(10)
            supervised.environment |= {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "200000"}
            supervised.start("arrived", "beat=0.3:1", SERVING, "beat=0.3:1", "obey=0")
            received = ""

            def until(text):
                nonlocal received
                while text not in received:
                    received += listener.recv(4096).decode() + "\n"

            until("EXTEND_TIMEOUT_USEC=")
            assert "READY" not in received
            until("READY=1")
            until("WATCHDOG=1")
            supervised.signal(signal.SIGTERM)
            until("STOPPING=1")
            until("STATUS=stopped")
        assert supervised.wait() == 0

    def test_json_log(self, supervised):
        supervised.environment["DYN_WORKER_LOG_FORMAT"] = "json"
        supervised.start("exit-message=3:no GPU found", "exit=3")
        supervised.wait()
        (last,) = [event for event in supervised.events() if event["message"] == "Worker stopped"]
        assert (last["code"], last["reason"], last["level"]) == (3, "no GPU found", "ERROR")
        assert last["logger"] == "dynamo_worker.supervisor"

    def test_a_log_reader_that_does_not_read(self, supervised, measured):
        """A full pipe at stderr must not hold the supervisor up."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        try:
            while True:
                os.write(writing, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(writing, True)
        supervised.start(SERVING, "arrived", "hang", stderr=writing)
        os.close(writing)
        started = time.monotonic()
        os.kill(supervised.worker, signal.SIGKILL)
        assert supervised.wait() == 137
        measured("kill -9 to exit, log reader stuck", time.monotonic() - started, 0.7)
        os.close(reading)


class TestFootprint:
    def test_memory_and_cpu(self, supervised, measured):
        supervised.start(SERVING, "arrived", "obey=0")
        pids = {"supervisor": supervised.pid, "guardian": supervised.guardian}
        for name, pid in pids.items():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            measured(f"PSS of the {name} in MB", pss / 1024, 15.0)
            assert pss < 15 * 1024

        def ticks(pid):
            """Return the CPU time of a process, in hundredths of a second."""
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        def switches():
            """Return the context switches of the supervisor: a process that blocks has none."""
            status = Path(f"/proc/{supervised.pid}/status").read_text().splitlines()
            return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)

        time.sleep(0.3)
        before = ticks(supervised.pid), ticks(supervised.guardian), switches()
        time.sleep(2.0)
        assert ticks(supervised.pid) - before[0] <= 1
        assert ticks(supervised.guardian) - before[1] <= 5  # the shared memory of others wakes it
        assert switches() - before[2] <= 2
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0

    def test_nothing_heavy_is_imported(self):
        code = "import sys, dynamo_worker.supervisor.supervisor; print(*sys.modules)"
        modules = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        heavy = {
            "argparse",
            "subprocess",
            "shutil",
            "tempfile",
            "logging",
            "http",
            "asyncio",
            "threading",
            "dynamo",
            "ssl",
        }
        assert not heavy & set(modules)
        assert {name for name in modules if name.startswith("dynamo_worker.") and "supervisor" not in name} == {
            "dynamo_worker.exit_codes",
            "dynamo_worker.lifecycle",
        }


def test_state_of_this_process():
    assert state_of(os.getpid()) == "R"
