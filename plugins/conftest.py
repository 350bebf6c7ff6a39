"""What the tests of all engine plugins need: the kit, as any plugin's author uses it."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_worker.testing import Worker

pytest_plugins = ["dynamo_worker.testing.plugin"]

#: Imported by every Python process of a worker. On a signal its main thread, which runs the model in an engine's ranks,
#: stands still for some seconds: in a loop, or waiting for a process with the name of a compiler.
_STANDSTILLS: Final = """\
import signal, subprocess, time

def work(*_):
    end = time.monotonic() + {seconds}
    while time.monotonic() < end:
        pass

def wait_for_compiler(*_):
    subprocess.run(["{compiler}", "{seconds}"])

signal.signal(signal.SIGRTMIN + 5, work)
signal.signal(signal.SIGRTMIN + 6, wait_for_compiler)
"""


def pytest_configure(config: pytest.Config) -> None:
    """Let engines and torch warn: what they deprecate is not ours to mend."""
    config.addinivalue_line("filterwarnings", "default")


class Standstills:
    """Makes a process of an engine work for a while without an answer to anybody, as if it compiled kernels."""

    #: What the worker says about it, and the signal.
    SIGNALS: Final = {
        r"process \d+ \(.+\) (used|runs)": signal.SIGRTMIN + 5,
        r"compiler cc1plus runs": signal.SIGRTMIN + 6,
    }

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._monkeypatch = monkeypatch

    def prepare(self, seconds: float) -> None:
        """Let the workers that are started from now on have standstills of this length."""
        compiler = self._directory / "cc1plus"
        shutil.copy(str(shutil.which("sleep")), compiler)
        code = _STANDSTILLS.format(seconds=seconds, compiler=compiler)
        (self._directory / "sitecustomize.py").write_text(code)
        paths = [str(self._directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def check(self, worker: Worker, sign: str) -> None:
        """Check that the worker has noticed one and has not taken it for a hang."""
        worker.wait_log(rf"No progress, but the engine works .*{sign}", 5.0)
        assert "Fatal" not in worker.log


@pytest.fixture
def standstills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standstills:
    """Return what makes an engine stand still while it works."""
    directory = tmp_path / "standstills"
    directory.mkdir()
    return Standstills(directory, monkeypatch)
