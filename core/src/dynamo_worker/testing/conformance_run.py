"""``dynamo-worker check NAME --conformance``: the conformance suite of one engine, check by check, without a test file.

Run as ``python -m dynamo_worker.testing.conformance_run NAME ONLY SLOW FLAGS…``; the command starts it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker.testing.subject import Subject
from dynamo_worker.testing.trial import private_directories

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Exit codes: no finding; findings; nothing to run.
_CLEAN, _FINDINGS, _NOTHING = 0, 1, 2
_REPORTER = "dynamo-worker-conformance"


class TestEngine(EngineConformance):
    """The engine of the command line."""

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        """Return the engine of the command line."""
        reporter = request.config.pluginmanager.get_plugin(_REPORTER)
        assert reporter is not None
        found: Subject = reporter.subject
        return found


class Reporter:
    """Prints one line for each check as it ends, what is wrong in full, and a summary.

    :param subject: the engine.
    :param only: words of the names of the checks to run; empty for all.
    :param slow: whether to run slow checks, too.
    """

    def __init__(self, subject: Subject, only: str, slow: bool) -> None:
        self.subject = subject
        self._only = only.replace("_", " ")
        self._slow = slow
        self._started = time.monotonic()
        self._count = self._total = 0
        self._group = ""
        self._outcomes: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0, "waived": 0}
        self._findings: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Choose the checks."""
        items[:] = [item for item in items if self._only in item.name.replace("_", " ")]
        if not self._slow:
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.option.markexpr = "slow or not slow"  # they are chosen
        self._total = len(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the outcome of one check."""
        if report.when != "call" and report.passed:
            return
        if report.when == "teardown":
            self._findings.append(f"{report.nodeid}: {report.longreprtext}")
            print(f"  the end of the engine failed: {_message(report)}", flush=True)
            self._outcomes["failed"] += 1
            return
        self._count += 1
        waiver = getattr(report, "wasxfail", None)
        outcome = "waived" if waiver is not None and report.skipped else report.outcome
        self._outcomes[outcome] += 1
        group = dict(report.user_properties).get("group", "")
        if group != self._group:
            self._group = str(group)
            print(self._group, flush=True)
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        word = {"passed": "ok  ", "failed": "FAIL", "skipped": "-   ", "waived": "ok  "}[outcome]
        reason = f" ({waiver if outcome == 'waived' else _message(report)})" if report.skipped else ""
        if waiver is not None and report.passed:
            reason = " (passed, so its waiver was not needed)"
        print(f"  {word} {self._count:3}/{self._total} {name}{reason}", flush=True)
        if report.failed:
            self._findings.append(name)
            print(f"    {_message(report)}", flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Note the kind of the check."""
        module = getattr(item, "function", None).__module__.rpartition(".")[2]
        item.user_properties.append(("group", module.replace("_", " ")))

    def summary(self) -> int:
        """Print the summary and return the exit code."""
        seconds = time.monotonic() - self._started
        passed, failed, skipped, waived = (self._outcomes[name] for name in ("passed", "failed", "skipped", "waived"))
        if not self._count:
            print(f"no check is called {self._only!r}", file=sys.stderr)
            return _NOTHING
        findings = f"{failed} finding{'s' if failed != 1 else ''}"
        print(
            f"{self.subject.engine}: {findings}; {passed} checks passed, "
            + (f"{waived} waived, " if waived else "")
            + f"{skipped} do not apply, in {seconds:.1f} s",
            flush=True,
        )
        for name in self._findings:
            print(f"  FAIL {name}")
        return _FINDINGS if failed else _CLEAN


def _message(report: pytest.TestReport) -> str:
    """Return why a check failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message) if crash is not None else report.longreprtext
    return text.removeprefix("dynamo_worker.testing.trial.Finding: ").removeprefix("AssertionError: ")


def main(argv: Sequence[str]) -> int:
    """Run the suite for ``NAME ONLY SLOW FLAGS…`` and return the exit code."""
    name, only, slow, *flags = argv
    reporter = Reporter(Subject(name, flags), only, slow == "slow")
    with tempfile.TemporaryDirectory(prefix="dwr-") as directory:
        options = ["-p", "no:cacheprovider", "-p", "dynamo_worker.testing.plugin", "-c", os.devnull]
        options += ["--rootdir", directory, "--basetemp", f"{directory}/t", "-o", "python_files=*.py"]
        options += ["--timeout", "300", "--timeout-method", "thread"]

        class Named:
            """Registers the reporter under its name before anything is collected."""

            @staticmethod
            @pytest.hookimpl(tryfirst=True)
            def pytest_configure(config: pytest.Config) -> None:
                """Register it in place of pytest's own report."""
                config.pluginmanager.set_blocked("terminalreporter")
                config.pluginmanager.register(reporter, _REPORTER)

        code = pytest.main([*options, __file__], plugins=[Named()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(code)
    return reporter.summary()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    shutil.rmtree(private_directories(), ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a worker ends: libraries such as MPI wait at exit for processes that are gone
