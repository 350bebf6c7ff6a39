#!/usr/bin/env python3
"""Start-up and footprint: how soon dynamo-worker answers, and what its supervisor costs.

first answer   time from the start of `dynamo-worker --engine echo --frontend` to the first successful request to
               /v1/chat/completions, which is polled from the start
commands       wall time of `--help`, `--version` and `engines`, and which engines they import
footprint      proportional set size (PSS) of the supervisor's processes, and CPU time when idle
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.processes import (
    Program,
    become_subreaper,
    command_line,
    cpu_seconds,
    descendants,
    end_all,
    loopback_environment,
    pss_bytes,
    reap_orphans,
)
from common.report import add_output_arguments, bar, machine, median, number, progress, seconds, table, write_json
from common.workbench import WorkbenchError, free_ports

_COMMANDS = ("--help", "--version", "engines")
#: Modules that none of these commands may import.
_HEAVY = ("dynamo_worker.engines.", "dynamo._core", "vllm", "sglang", "tensorrt_llm", "torch")
_START_BOUND = 60.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/startup.py --repeat 3 --json startup.json",
    )
    parser.add_argument(
        "--repeat", type=int, default=5, metavar="N", help="number of runs; medians are shown (default: 5)"
    )
    parser.add_argument(
        "--idle", type=float, default=10.0, metavar="S", help="seconds to observe the idle processes (default: 10)"
    )
    add_output_arguments(parser)
    return parser.parse_args()


def _program() -> list[str]:
    script = Path(sys.executable).with_name("dynamo-worker")
    return [str(script)] if script.exists() else [sys.executable, "-m", "dynamo_worker"]


def _time_command(argument: str, environment: dict[str, str]) -> float:
    start = time.monotonic()
    result = subprocess.run(
        [*_program(), argument], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    elapsed = time.monotonic() - start
    if result.returncode != 0:
        raise WorkbenchError(f"dynamo-worker {argument} ended with code {result.returncode}: {result.stderr.decode()}")
    return elapsed


def _heavy_imports(argument: str, environment: dict[str, str]) -> list[str]:
    """Return the engines (and what only engines need) that a command imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dynamo_worker", argument],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    return sorted(name for name in imported if name.startswith(_HEAVY))


def _ask(port: int) -> str | None:
    """Ask for one answer; return its text, None when there is none yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    body = {"model": "echo", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello there"}]}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if response.status != 200:
        return None
    text: str = json.loads(content)["choices"][0]["message"]["content"]
    return text


def _start(directory: Path, turn: int, logs: Path) -> tuple[Program, float]:
    """Start worker and frontend; return the program and the seconds until its first answer."""
    (port,) = free_ports(1)
    temporary = directory / f"t{turn}"
    temporary.mkdir()
    environment = loopback_environment(directory / f"kv{turn}", temporary)
    # What the newcomer types sets none of these: the embedded default chooses its own discovery directory.
    for name in ("DYN_DISCOVERY_BACKEND", "DYN_FILE_KV", "DYN_LOG"):
        del environment[name]
    command = [*_program(), "--engine", "echo", "--frontend", f"127.0.0.1:{port}"]
    program = Program(f"startup-{turn}", command, environment, logs / f"startup-{turn}.log")
    while _ask(port) is None:
        if not program.running or time.monotonic() - program.started_at > _START_BOUND:
            tail = program.log_tail()
            _stop(program)
            raise WorkbenchError(f"dynamo-worker does not answer; its log ends:\n{tail}")
        time.sleep(0.002)
    return program, time.monotonic() - program.started_at


def _stop(program: Program) -> float:
    tree = program.tree()
    start = program.signal(signal.SIGTERM)
    if program.wait(30.0) is None:
        end_all(tree)
        program.wait(5.0)
    end_all(reap_orphans(()))
    return time.monotonic() - start


def _roles(program: Program) -> dict[str, int]:
    """Return the processes of a running worker by what they are."""
    roles = {"supervisor": program.pid}
    everybody = descendants(program.pid)
    worker = next((pid for pid in everybody if "--no-supervise" in command_line(pid)), None)
    if worker is None:
        raise WorkbenchError("dynamo-worker has no worker process")
    between = [pid for pid in everybody if worker in descendants(pid)]
    if between:
        roles["guardian"] = between[0]
    roles["worker"] = worker
    frontend = next((pid for pid in everybody if "frontend" in command_line(pid)), None)
    if frontend is not None:
        roles["frontend"] = frontend
    return roles


def _footprint(program: Program, idle: float) -> list[dict[str, Any]]:
    roles = _roles(program)
    time.sleep(1.0)
    progress(f"watching the idle processes for {idle:g} s")
    before = {role: cpu_seconds(pid) for role, pid in roles.items()}
    time.sleep(idle)
    return [
        {"process": role, "pss_bytes": pss_bytes(pid), "idle_cpu_share": (cpu_seconds(pid) - before[role]) / idle}
        for role, pid in roles.items()
    ]


def _measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    logs = arguments.keep_logs or directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = loopback_environment(directory / "kv", directory)
    commands = []
    for argument in _COMMANDS:
        progress(f"dynamo-worker {argument}")
        _time_command(argument, environment)
        times = [_time_command(argument, environment) for _ in range(2 * arguments.repeat)]
        commands.append({"command": argument, "times_s": times, "heavy_imports": _heavy_imports(argument, environment)})
    first_answers = []
    stops = []
    footprint: list[dict[str, Any]] = []
    for turn in range(arguments.repeat):
        program, first_answer = _start(directory, turn, logs)
        progress(f"first answer after {first_answer:.3f} s ({turn + 1} of {arguments.repeat})")
        first_answers.append(first_answer)
        try:
            if turn == arguments.repeat - 1:
                footprint = _footprint(program, arguments.idle)
        finally:
            stops.append(_stop(program))
    return {"commands": commands, "first_answer_s": first_answers, "stop_s": stops, "footprint": footprint}


def _report(results: dict[str, Any]) -> None:
    def bounds(values: list[float]) -> str:
        return f"{seconds(min(values))} … {seconds(max(values))}"

    rows = []
    for entry in results["commands"]:
        times = entry["times_s"]
        imports = entry["heavy_imports"]
        verdict = bar(median(times), at_most=0.3) if not imports else "MISSED, imports " + ", ".join(imports[:3])
        row = [f"dynamo-worker {entry['command']}", seconds(median(times)), bounds(times), "≤ 300 ms", verdict]
        rows.append(row)
    answers, stops = results["first_answer_s"], results["stop_s"]
    rows.append(["first answer", seconds(median(answers)), bounds(answers), "≤ 3 s", bar(median(answers), at_most=3.0)])
    rows.append(["SIGTERM to exit, idle, default grace period", seconds(median(stops)), bounds(stops), "", ""])
    table("Start-up", ["", "median", "range", "bar", ""], rows)
    rows = []
    for entry in results["footprint"]:
        supervising = entry["process"] in ("supervisor", "guardian")
        megabytes = entry["pss_bytes"] / 1e6
        share = entry["idle_cpu_share"]
        verdict = ""
        if supervising:
            verdict = bar(megabytes, at_most=15.0) if share <= 0.0005 else "MISSED, uses the CPU when idle"
        rows.append(
            [
                entry["process"],
                number(megabytes, "MB"),
                f"{share * 100:.3f} %",
                "≤ 15 MB, no CPU" if supervising else "",
                verdict,
            ]
        )
    table("Footprint when idle", ["", "PSS", "CPU", "bar", ""], rows)


def main() -> int:
    """Run the benchmark."""
    arguments = _arguments()
    become_subreaper()
    directory = Path(tempfile.mkdtemp(prefix="dwb-"))
    try:
        results = _measure(arguments, directory)
    except (WorkbenchError, OSError) as error:
        print(f"startup.py: {error}", file=sys.stderr)
        return 1
    finally:
        end_all(descendants(os.getpid()))
        shutil.rmtree(directory, ignore_errors=True)
    _report(results)
    about = machine()
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, load average {about['load_average']:.1f}")
    write_json(arguments.json, "startup", vars(arguments), results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
