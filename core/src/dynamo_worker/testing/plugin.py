"""The pytest plugin of the test kit."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing.cluster import Cluster
from dynamo_worker.testing.leftovers import Leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.testing.subject import Subject


#: The markers of the kit's tests.
_MARKERS = {
    "slow": "takes more than half a minute; runs with `-m slow` only",
    "gpu": "needs an NVIDIA GPU",
}


def pytest_configure(config: pytest.Config) -> None:
    """Register the kit's markers, and restore the default actions of signals that the tests send to workers.

    Shells start background jobs with SIGINT and SIGQUIT ignored, and ``nohup`` ignores SIGHUP. Workers inherit this,
    and keep ignoring those signals.
    """
    for name, text in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out, unless the command line or the configuration selects tests by their markers."""
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def marker() -> str:
    """Return the value that marks this test's processes."""
    return uuid.uuid4().hex


@contextlib.contextmanager
def leftovers_refused(marker: str) -> Iterator[Leftovers]:
    """Fail if a marked process, a shared-memory segment or a temporary file is left at the end of the block."""
    # A short path: Unix sockets below it must stay under 108 characters.
    tmp = Path(tempfile.mkdtemp(prefix="dwt-"))
    leftovers = Leftovers(marker, tmp)
    try:
        yield leftovers
        leftovers.check(timeout=5.0)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def private_cluster(
    directory: Path, leftovers: Leftovers, marker: str, subject: Subject, engine_args: list[str]
) -> Iterator[Cluster]:
    """Make a cluster without any process, and end everything started in it at the end of the block."""
    cluster = Cluster(directory, leftovers.tmp, marker, engine_args=engine_args)
    cluster.model = subject.model
    cluster.start_seconds = subject.start_seconds
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def no_leftovers(marker: str) -> Iterator[Leftovers]:
    """Fail the test if a process, a shared-memory segment or a temporary file of it is left at its end."""
    with leftovers_refused(marker) as leftovers:
        yield leftovers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a Llama with two layers, random weights and a byte-level tokenizer.

    It needs torch, transformers and tokenizers, which engines with real models bring along.
    """
    from dynamo_worker.testing.tiny_model import make

    return make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def subject() -> Subject:
    """Return the engine that is tested; a ``conftest.py``, a test module or a test class has a fixture of its own."""
    raise NotImplementedError("no engine to test: define a fixture `subject` that returns a Subject")


@pytest.fixture
def engine_args(subject: Subject) -> list[str]:
    """Return the arguments that every worker of the test is started with; override it to add some."""
    return subject.args


@pytest.fixture
def cluster(
    tmp_path: Path, no_leftovers: Leftovers, marker: str, subject: Subject, engine_args: list[str]
) -> Iterator[Cluster]:
    """Return a cluster without any process; everything started in it is ended with the test."""
    with private_cluster(tmp_path, no_leftovers, marker, subject, engine_args) as cluster:
        yield cluster
