"""Runs the checks and the test suites, two at a time, and the suites that failed once more, alone.

Run by `.ci/run`, with nox on the path. Two of them keep two cores busy: what makes this shorter is less work. Suites
are isolated from each other; where that cannot be (`.ci/isolated`), all runs one after the other.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ISOLATED = str(ROOT / ".ci" / "isolated")

#: What may differ between the oldest and the newest Python: event loops, signals, processes, files, descriptors and
#: typing, in tests that take seconds, and whole workers. `nox -s pythons` has the rest.
VERSIONED = [
    *("tests/unit/host", "tests/unit/engines"),
    # These measure times of processes and terminals, which are the machine's.
    *(f"--ignore=tests/unit/host/test_{name}.py" for name in ("drain_progress", "engine_activity", "engine_monitors")),
    *(f"tests/unit/kit/test_{name}.py" for name in ("answer", "blocking", "child_metrics", "engine_lifecycle")),
    *(f"tests/unit/kit/test_{name}.py" for name in ("headless", "in_flight", "model_arguments", "push_engine")),
    "tests/unit/kit/test_child_process.py::test_tasks_answer_and_are_cancelled",
    *(f"tests/unit/supervisor/test_{name}.py" for name in ("channel", "files", "interpreter", "linux", "loop")),
    *(f"tests/unit/supervisor/test_{name}.py" for name in ("protocol", "spawn", "worker_channel")),
    *(f"tests/unit/cli/test_{name}.py" for name in ("help", "main", "run")),
    *(f"tests/unit/test_{name}.py" for name in ("deadline", "errors", "logs", "packaging")),
    "tests/integration/test_request_path.py::test_chat",
    "tests/integration/test_request_path.py::test_a_client_that_goes_away_is_noticed",
    "tests/faults/test_echo.py::TestProcessTree::test_worker_killed_busy",
    "tests/faults/test_echo.py::TestProcessTree::test_engine_process_stopped",
]
#: Sessions of nox and what they are told, the longest first, so that the lanes end together. A suite that is told
#: nothing runs all its tests.
SUITES: dict[str, list[str]] = {
    "lint": [],  # first, because it is over in seconds
    "tests(vllm)": [],
    "tests(core)": [],
    "tests(sglang)": [],
    "tests(transformers)": [],
    "tests(trtllm)": [],
    "tests(dynamo)": [],
    "tests(server)": [],
    "pythons-3.10": VERSIONED,
    "pythons-3.13": VERSIONED,
    "build": [],
    "types": [],
    "example": [],
    "deploy": [],
    "docs": ["--check"],
}
#: Those that download while they run, or start no workers: nothing is to be kept from them.
OPEN = {"lint", "types", "deploy", "docs", "build"}
LANES = 2
#: Fewer random faults and fuzzed requests than the tests' own defaults: `nightly` has 20 times as many.
FEWER = {"DYNAMO_WORKER_TEST_ROUNDS": "40", "DYNAMO_WORKER_TEST_EXAMPLES": "50"}

#: What nox says of a command that failed: its program and its exit code.
_FAILURE = re.compile(r"^nox > Command (\S+) .*failed with exit code (-?\d+)", re.MULTILINE)
#: With more failures than this something is broken, and another run would only take time.
_FEW = 8


def main() -> int:
    """Run all suites, print what they printed, one after the other, and return 0 if all passed."""
    isolated = subprocess.run([ISOLATED, "true"], capture_output=True, check=False).returncode == 0
    if not isolated:
        print("suites: no namespaces here (they need root): one suite after the other", flush=True)
    waiting = list(SUITES)
    failed: list[str] = []
    broken: list[str] = []
    lock = threading.Lock()

    def lane() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                suite = waiting.pop(0)
            passed, only_tests = _run(suite, SUITES[suite], lock, isolated=isolated and suite not in OPEN)
            if not passed:
                (failed if only_tests else broken).append(suite)

    lanes = [threading.Thread(target=lane) for _ in range(LANES if isolated else 1)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    broken += [suite for suite in failed if not _run_again(suite, lock, isolated=isolated)]
    for suite in broken:
        print(f"suites: {suite} failed", flush=True)
    return 1 if broken else 0


def _run(suite: str, selection: list[str], lock: threading.Lock, *, isolated: bool) -> tuple[bool, bool]:
    """Install what a suite needs and run it; return whether it passed, and else whether tests are all that failed.

    A pytest that was killed, or could not collect, has not run everything: another run of what failed proves nothing.
    """
    started = time.monotonic()
    print(f"suites: {suite} begins", flush=True)
    told = ["--", *selection] if selection else []
    if isolated:
        # Isolated tests have no network, so what they need comes first.
        output, passed = _nox(suite, "--install-only")
        if passed:
            output, passed = _nox(suite, "--no-install", *told, isolated=True)
    else:
        output, passed = _nox(suite, *told)
    with lock:
        print(output)
        took = time.monotonic() - started
        print(f"suites: {suite} {'passed' if passed else 'failed'} after {took:.0f} s", flush=True)
    return passed, set(_FAILURE.findall(output)) == {("pytest", "1")}


def _run_again(suite: str, lock: threading.Lock, *, isolated: bool) -> bool:
    """Run the failed tests of a suite once more with nothing beside them, and say so; return whether they passed.

    Two cores cannot keep every bound of a test with an engine that compiles beside it. A defect fails again.
    """
    try:
        tests = list(json.loads((_cache(suite) / "v" / "cache" / "lastfailed").read_text()))
    except (OSError, ValueError):
        return False
    if not 0 < len(tests) <= _FEW:
        return False
    print(f"suites: {suite}: once more, alone: {len(tests)} failed", *tests, sep="\n  ", flush=True)
    passed, _ = _run(suite, tests, lock, isolated=isolated)
    if passed:
        print(f"suites: UNSTEADY, passed when run alone: {', '.join(tests)}", flush=True)
    return passed


def _nox(suite: str, *options: str, isolated: bool = False) -> tuple[str, bool]:
    """Run a session of nox; return what it printed, and whether it passed."""
    command = [shutil.which("nox") or "nox", "--no-error-on-missing-interpreters", "-s", suite, *options]
    done = subprocess.run(
        [ISOLATED, *command] if isolated else command,
        cwd=ROOT, env={**FEWER, **os.environ}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    return done.stdout, done.returncode == 0


def _cache(suite: str) -> pathlib.Path:
    """Return the folder in which pytest keeps which tests of a suite failed, as noxfile.py names it."""
    return ROOT / ".pytest_cache" / suite


if __name__ == "__main__":
    sys.exit(main())
