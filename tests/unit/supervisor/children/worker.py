"""A worker that does what its arguments say, one after the other: what the supervisor's tests hurt and watch.

settings=JSON state=NAME[@SECONDS] beat=SECONDS:COUNT register-file=ROOT:HEX register-etcd=HEX
child=SCRIPT (with the interpreter, waits until it is up) frontend=PATH:ALLOWED temp deep=LEVELS close-control garbage
fill touch=PATH print=TEXT exit-message=CODE:REASON await=PATH obey=CODE (exit when told to stop)
obey-slowly=CODE:SECONDS hear=COUNT (requests to stop) sleep=SECONDS segment hang exit=CODE die=SIGNAL
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
running = []
control = socket.socket(fileno=int(os.environ["DYNAMO_WORKER_CONTROL_FD"]))
os.set_inheritable(control.fileno(), False)


def send(**message: object) -> None:
    control.send(json.dumps(message).encode())


def child(script: str, *arguments: str) -> int:
    """Start a script of this folder; it writes a line when it has arrived where it wants to be."""
    command = [sys.executable, str(HERE / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=bool(arguments))
    assert process.stdout is not None
    running.append(process)
    process.stdout.readline()
    return process.pid


def wait_for_stop() -> dict[str, object]:
    control.settimeout(None)
    message = json.loads(control.recv(65536) or b"{}")
    print("told", json.dumps(message), file=sys.stderr, flush=True)
    return message


def do(step: str) -> None:
    name, _, value = step.partition("=")
    if name == "settings":
        send(type="settings", **json.loads(value))
    elif name == "state":
        state, _, seconds = value.partition("@")
        send(type="state", state=state, deadline=time.monotonic() + float(seconds) if seconds else None, in_flight=2)
    elif name == "beat":
        pause, _, count = value.partition(":")
        for _ in range(int(count)):
            send(type="heartbeat", in_flight=1)
            time.sleep(float(pause))
    elif name == "register-file":
        from dynamo_worker.supervisor import ledger

        root, _, instance = value.rpartition(":")
        ledger.record_registration(os.environ["DYNAMO_WORKER_RUN_DIR"], "file", instance, root=root)
        for card in (f"v1/instances/ns%2Fbackend%2Fgenerate%2F{instance}", f"v1/mdc/ns%2F{instance}%2Flora"):
            path = Path(root, card)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    elif name == "register-etcd":
        from dynamo_worker.supervisor import ledger

        ledger.record_registration(os.environ["DYNAMO_WORKER_RUN_DIR"], "etcd", value)
    elif name == "child":
        child(value)
    elif name == "frontend":
        from dynamo_worker.supervisor import ledger, linux

        path, _, allowed = value.rpartition(":")
        pid = child("frontend.py", path)
        stat = linux.read_stat(pid)
        assert stat is not None
        process = linux.Process(pid, stat.start)
        ledger.record_frontend(os.environ["DYNAMO_WORKER_RUN_DIR"], process, float(allowed))
    elif name == "temp":
        Path(os.environ["TMPDIR"], "left", "behind").mkdir(parents=True)
        Path(os.environ["TMPDIR"], "left", "behind", "file").write_text("x" * 1000)
    elif name == "segment":
        segment = f"dwtest-{os.getpid()}-{len(running)}"
        with open(os.environ["SHM_NAMES"], "a") as file:
            file.write(f"{segment}\n")
        running.append(os.open(f"/dev/shm/{segment}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    elif name == "deep":
        os.chdir(os.environ["TMPDIR"])
        for _ in range(int(value)):
            os.mkdir("d")
            os.chdir("d")
        os.chdir("/")
    elif name == "close-control":
        control.close()
    elif name == "garbage":
        for junk in (
            b"\xff\xfe",
            b"[]",
            b"{",
            b'{"type": 7}',
            b'{"type":"state","state":9,"deadline":"x"}',
            b"[" * 5000,
        ):
            control.send(junk)
        send(type="settings", termination_grace_period=float("nan"), heartbeat_timeout="soon", log_format=3)
        send(type="no such thing")
    elif name == "touch":
        Path(value).touch()
    elif name == "print":
        print(value, file=sys.stderr, flush=True)
    elif name == "environment":
        Path(value).write_text(json.dumps(dict(os.environ)))
    elif name == "inherited":
        paths = {entry: f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")}
        descriptors = {entry: os.readlink(path) for entry, path in paths.items() if os.path.exists(path)}
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        facts = {"descriptors": descriptors, "status": status, "session": os.getsid(0), "pid": os.getpid()}
        Path(value).write_text(json.dumps(facts))
    elif name == "dump-on-usr1":
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    elif name == "exit-message":
        code, _, reason = value.partition(":")
        send(type="exit", code=int(code), reason=reason)
    elif name == "await":
        while not Path(value).exists():
            time.sleep(0.005)
    elif name == "obey":
        wait_for_stop()
        sys.exit(int(value))
    elif name == "obey-slowly":
        code, _, seconds = value.partition(":")
        wait_for_stop()
        send(type="state", state="DRAINING", deadline=time.monotonic() + 60, in_flight=1)
        time.sleep(float(seconds))
        sys.exit(int(code))
    elif name == "hear":
        for _ in range(int(value)):
            wait_for_stop()
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "on-term":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(int(value)))
    elif name == "hang":
        while True:
            time.sleep(1000)
    elif name == "exit":
        sys.exit(int(value))
    elif name == "die":
        os.kill(os.getpid(), int(value))
    else:
        raise SystemExit(f"no step {step}")


for step in sys.argv[1:]:
    do(step)
