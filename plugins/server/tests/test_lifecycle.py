"""Starting a server, watching it, and ending it; and servers that run elsewhere."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
import trustme
import uvloop

from conftest import FAKE, Running, elsewhere, engine_of, fake, running
from dynamo_worker import Deadline, EngineDeadError, StartError
from dynamo_worker.engine import LocalContext
from dynamo_worker.errors import UsageError
from dynamo_worker_server import engine as server_engine
from dynamo_worker_server import server_process
from dynamo_worker_server.server_process import choose_port

if TYPE_CHECKING:
    from pathlib import Path

SHELL_WITH_BACKGROUND = f"{sys.executable} {FAKE} --port $0 & sleep 1000"


def start_error(*words: str, seconds: float = 20.0) -> str:
    """Return the message of a start that must fail, after which nothing is left."""

    async def main() -> str:
        engine = engine_of(*words)
        try:
            with pytest.raises((StartError, UsageError)) as caught:
                await asyncio.wait_for(engine.start(1), seconds)
        finally:
            pids = list(engine.processes())
            await engine.shutdown(Deadline.after(10))
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        return str(caught.value)

    return uvloop.run(main())


# --- The start


def test_a_command_that_does_not_exist() -> None:
    assert "cannot run '/nowhere/llama-server': No such file" in start_error("--", "/nowhere/llama-server", "{port}")


def test_a_command_that_may_not_be_run(tmp_path: Path) -> None:
    (tmp_path / "server").write_text("")
    assert "Permission denied" in start_error("--", str(tmp_path / "server"), "{port}")


def test_a_command_that_ends_at_once_and_says_why() -> None:
    message = start_error("--", *fake("--die-after", "0"))
    assert re.search(r"has ended with code 3; its last output:\n  error: the model cannot be loaded", message)


def test_a_server_that_forks_a_daemon_and_leaves() -> None:
    assert "code 0; it has to stay in the foreground" in start_error("--", *fake("--daemon"))


def test_last_words_are_bounded() -> None:
    program = "import sys; sys.stderr.write('x' * 10**6 + '\\n' + 'y\\n' * 10**5); sys.exit(1)"
    message = start_error("--", sys.executable, "-c", program, "{port}")
    assert len(message) < 3000
    assert message.count("\n  y") == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--health", "silent"], "not ready after 1 s: it does not answer /health"),
        (["--health", "garbage"], "not ready after 1 s: the answer is not HTTP"),
        (["--health", "large"], "not ready after 1 s: the answer has more than 1048576 bytes"),
        (["--health", "500"], "not ready after 1 s: it answers /health with status 500"),
        (["--health", "302"], "redirects elsewhere .status 302., which is not followed"),
        (["--health", "401"], "refuses the API key"),
        (["--key", "sk-1"], "v1/models refuses the API key .status 401"),
        (["--models", "none"], "has no models"),
        (["--models", "404"], "does not name its models: .*404"),
        (["--models", "garbage"], "without a list of models"),
        (["--models", "302"], "v1/models redirects elsewhere .status 302., which is not followed"),
        (["--health", "html", "--models", "html"], "does not name its models: .*what is not JSON"),
        (["--silent"], "does not answer its first request: /v1/chat/completions: no answer after 1 s"),
        (["--pings"], "does not answer its first request: /v1/chat/completions: no answer after 1 s"),
    ],
)
def test_a_server_that_never_becomes_ready(flags: list[str], message: str) -> None:
    """One that listens already: busy machines take more than a second to start one."""
    with elsewhere(*flags) as (port, _):
        assert re.search(message, start_error("--server-start-timeout", "1", "--attach", f"http://127.0.0.1:{port}"))


def test_a_server_that_loads_for_a_while() -> None:
    async def main() -> None:
        async with running("--", *fake("--loading", "1.5", "--models", "a,b", "--context-length", "4096")) as server:
            assert (server.info.model_name, tuple(server.info.model_aliases)) == ("a", ("b",))
            assert server.info.context_length == 4096
            await server.ask(model="b")
            assert (await server.stats())["model b"] == 1

    uvloop.run(main())


def test_a_server_without_health_or_models() -> None:
    async def main() -> None:
        async with running("--", *fake("--health", "404")) as server:
            await server.engine.check_health()
        flags = ("--server-model", "m", "--served-model-name", "n")
        async with running(*flags, "--", *fake("--models", "404")) as server:
            await server.ask()
            assert (await server.stats())["model m"] == 3

    uvloop.run(main())


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_server_with_one_api(api: str) -> None:
    """As for a model without a chat template, or a server without the old API."""

    async def main() -> None:
        async with running("--", *fake("--apis", api)) as server:
            assert tuple(server.info.endpoint_types) == (api,)
            canary = server.engine.canary_request()
            assert ("messages" in canary) == (api == "chat")
            assert [chunk async for chunk in server.engine.generate(canary, LocalContext("canary"))]

    uvloop.run(main())


def test_a_server_that_answers_nothing() -> None:
    assert "answers neither API: /v1/chat/completions: Not Found" in start_error("--", *fake("--apis", "none"))
    assert "the server has failed: no kernel image" in start_error("--", *fake("--broken"))


def test_a_model_that_the_server_lacks() -> None:
    assert "--server-model c: the server has a, b" in start_error("--server-model", "c", "--", *fake("--models", "a,b"))


def test_a_port_in_use() -> None:
    with elsewhere() as (port, _):
        command = (sys.executable, FAKE, "--port", str(port))
        assert f"port {port} is in use" in start_error("--server-port", str(port), "--", *command)


def test_a_port_that_another_server_takes_meanwhile() -> None:
    """Its answers must not pass for those of a command that waits, or is stuck."""
    port = choose_port(None)
    late = f"sleep 1; exec {sys.executable} {FAKE} --port {port}"
    other = subprocess.Popen(["sh", "-c", late], start_new_session=True)
    try:
        message = start_error("--server-port", str(port), "--", "sleep", "1000")
        assert f"port {port} belongs to a process that sleep has not started" in message
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()


# --- The processes


def test_the_process_that_listens_is_watched_too() -> None:
    async def main() -> None:
        async with running("--", "sh", "-c", SHELL_WITH_BACKGROUND, "{port}") as server:
            shell, listener = server.engine.processes()
            assert psutil.Process(listener).ppid() == shell
            assert FAKE in psutil.Process(listener).cmdline()

    uvloop.run(main())


def test_further_processes_are_watched_on_request() -> None:
    async def main() -> None:
        program = f"sleep 1000 & {SHELL_WITH_BACKGROUND}"
        async with running("--server-process", "sleep", "--", "sh", "-c", program, "{port}") as server:
            sleeping = list(server.engine.processes())[2:]
            assert [psutil.Process(pid).name() for pid in sleeping] == ["sleep", "sleep"]
            with pytest.raises(Exception, match="the server has failed"):
                await server.ask("fail:status-500")
            os.kill(sleeping[0], signal.SIGKILL)
            while psutil.pid_exists(sleeping[0]) and psutil.Process(sleeping[0]).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineDeadError, match=f"process {sleeping[0]} of the server has ended"):
                await server.ask("fail:status-500")

    uvloop.run(main())
    assert "no process whose command line begins so" in start_error("--server-process", "VLLM", "--", *fake())


def test_files_that_close_while_they_are_listed_hide_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy server opens and closes files all the time."""
    real = os.readlink
    with socket.socket() as listening:
        inode = real(f"/proc/self/fd/{listening.fileno()}")[8:-1]

        def readlink(path: Path) -> str:
            if int(path.name) < listening.fileno():
                raise FileNotFoundError(path)
            return real(path)

        monkeypatch.setattr(os, "readlink", readlink)
        assert inode in server_process._sockets_of(os.getpid())


@pytest.mark.parametrize("flags", [[], ["--ignore-sigterm"]], ids=["well-behaved", "stubborn"])
def test_the_whole_tree_ends(flags: list[str]) -> None:
    async def main() -> list[psutil.Process]:
        program = f"{SHELL_WITH_BACKGROUND} & setsid sleep 1000"
        if flags:
            program = f"trap '' TERM; {program}"
        async with running("--server-stop-timeout", "0.5", "--", "sh", "-c", program, "{port}") as server:
            (leader, *_) = server.engine.processes()
            tree = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
            assert len(tree) == 4
            since = time.monotonic()
        assert time.monotonic() - since < 3.0
        return tree

    tree = uvloop.run(main())
    # Nobody may be there to reap those whose parents were killed.
    assert not [one for one in tree if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_stopped_server_ends() -> None:
    async def main() -> int:
        async with running("--server-stop-timeout", "0.5", "--", *fake()) as server:
            (pid,) = server.engine.processes()
            os.kill(pid, signal.SIGSTOP)
        return pid

    assert not psutil.pid_exists(uvloop.run(main()))


def test_output_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with running("--", *fake()):
            pass

    uvloop.run(main())
    assert "fake server is ready" in capfd.readouterr().err


# --- Its health


async def failing_checks(server: Running) -> int:
    """Return how many checks fail until one says that the server is dead."""
    for count in range(1, 10):
        try:
            await server.engine.check_health()
        except EngineDeadError:
            return count
        except Exception:
            await asyncio.sleep(0)
    pytest.fail("it is never called dead")


def test_one_failed_check_is_no_death() -> None:
    async def main() -> None:
        with elsewhere() as (port, process):
            async with running("--attach", f"http://127.0.0.1:{port}") as server:
                assert list(server.engine.processes()) == []
                for _ in range(3):
                    server.engine._health_path = "/none"
                    with pytest.raises(Exception, match="answers /none with status 404"):
                        await server.engine.check_health()
                    server.engine._health_path = "/health"
                    await server.engine.check_health()
                process.kill()
                process.wait()
                assert await failing_checks(server) == 3
                with pytest.raises(OSError):
                    await server.ask()

    uvloop.run(main())


def test_a_server_that_names_no_models_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_engine, "_LOOK_SECONDS", 0.5)
    assert "does not name its models: no answer" in start_error("--", *fake("--models", "silent"))


def test_who_waits_is_told_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_engine, "_REPORT_SECONDS", 0.2)
    with caplog.at_level("INFO"):
        start_error("--server-start-timeout", "1", "--attach", "http://127.0.0.1:1")
    reports = [record.getMessage() for record in caplog.records if "Server is not ready yet" in record.getMessage()]
    assert 2 <= len(reports) <= 5


def test_a_server_elsewhere_that_starts_again_serves_again() -> None:
    """Its connections break and are refused meanwhile; three failed checks in a row would be its death."""

    async def main() -> None:
        with elsewhere("--pause", "0.05") as (port, process):
            async with running("--attach", f"http://127.0.0.1:{port}") as server:
                asked = asyncio.ensure_future(server.ask("a", 100))
                await asyncio.sleep(0.5)
                process.kill()
                process.wait()
                with pytest.raises(OSError, match="closed the connection"):
                    await asked
                for _ in range(2):
                    with pytest.raises(Exception, match="does not answer /health") as caught:
                        await server.engine.check_health()
                    assert not isinstance(caught.value, EngineDeadError)
                with pytest.raises(OSError):
                    await server.ask("a", 1)
                with elsewhere(port=port):
                    await server.engine.check_health()
                    assert await server.ask("a", 1) == "a "

    uvloop.run(main())


def test_http_and_tls_are_told_apart(tmp_path: Path) -> None:
    """At once: no waiting will change it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    files = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    certificate.cert_chain_pems[0].write_to_path(files[0])
    certificate.private_key_pem.write_to_path(files[1])
    with elsewhere() as (port, _):
        assert "does not speak TLS" in start_error("--attach", f"https://127.0.0.1:{port}", seconds=10)
    with elsewhere("--certificate", *map(str, files)) as (port, _):
        message = start_error("--attach", f"http://127.0.0.1:{port}", "--server-start-timeout", "0.5")
        assert re.search("it is TLS, which https:// is for|closed the connection", message)
        message = start_error("--attach", f"https://localhost:{port}", seconds=10)
        assert f"the certificate of https://localhost:{port} cannot be trusted: unable to get local issuer" in message


def test_a_server_elsewhere_goes_on() -> None:
    async def main() -> None:
        with elsewhere() as (port, process):
            async with running("--attach", f"http://localhost:{port}/v1") as server:
                assert await server.ask("a", 1) == "a "
            assert process.poll() is None

    uvloop.run(main())


def test_nothing_answers_there() -> None:
    message = start_error("--attach", "http://127.0.0.1:1", "--server-start-timeout", "0.5")
    assert "http://127.0.0.1:1 is not ready after 0.5 s" in message
    assert "refused" in message


def test_tls_with_a_key_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key may change, and is in no log; a certificate that nobody vouches for is refused."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    key = tmp_path / "token"
    key.write_text("sk-secret\n")

    async def main(port: int) -> None:
        words = ("--attach", f"https://localhost:{port}", "--server-token-file", str(key))
        async with running(*words) as server:
            assert await server.ask("a", 1) == "a "
            await server.engine.check_health()
            key.write_text("sk-other\n")
            await server.engine.check_health()
            with pytest.raises(Exception, match="refuses the worker's API key") as caught:
                await server.ask("a", 1)
            assert "sk-" not in str(caught.value)

    with elsewhere("--key", "sk-secret", "--certificate", str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")) as (
        port,
        _,
    ):
        words = ("--attach", f"https://localhost:{port}", "--server-token-file", str(key))
        assert "cannot be trusted" in start_error(*words)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        uvloop.run(main(port))
