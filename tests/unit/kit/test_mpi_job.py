"""A worker leaves the MPI job it was started in, and a child takes its place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dynamo_worker import Deadline
from dynamo_worker.kit import mpi_job
from dynamo_worker.kit.engine_processes import Launched
from dynamo_worker.supervisor import process_tree
from dynamo_worker.supervisor.linux import Process

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMIX_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1;tcp://127.0.0.1",
    "OMPI_MCA_btl": "tcp",
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_")):
            monkeypatch.delenv(name)
    yield
    mpi_job._place.clear()
    mpi_job._joined.clear()


def test_a_worker_by_itself_is_in_no_job() -> None:
    mpi_job.leave()
    assert (mpi_job.rank(), mpi_job.size(), mpi_job.left()) == (0, 1, False)


@pytest.mark.parametrize(
    "job",
    [
        OPEN_MPI,
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "PMIX_SERVER_URI2": "x"},
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
    ],
    ids=["mpirun", "srun", "pmi"],
)
def test_it_knows_its_place_and_leaves(job: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert (mpi_job.rank(), mpi_job.size(), mpi_job.left()) == (1, 4, False)
    for _ in range(2):
        mpi_job.leave()
        assert (mpi_job.rank(), mpi_job.size(), mpi_job.left()) == (1, 4, True)
        assert not [name for name in job if name in os.environ and name != "OMPI_MCA_btl"]


def test_a_child_takes_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    mpi_job.leave()
    assert os.environ.get("OMPI_MCA_btl") == "tcp", "a setting, which every process of the user should have"  # noqa: SIM112
    with open(os.path.join(tmp_path, "says_its_place.py"), "w") as file:
        file.write("import json, os; open('place', 'w').write(json.dumps(dict(os.environ)))")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child: subprocess.Popen[bytes] = mpi_job.join("says_its_place")
    assert child.wait(20) == 0
    assert child.args[0] == sys.executable  # type: ignore[index]
    with open("place") as file:
        assert json.load(file).items() >= OPEN_MPI.items()


def test_a_number_that_is_none_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4(x2)")
    assert mpi_job.size() == 1


def test_what_runs_in_its_place_and_the_ranks_end_but_not_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> tuple[subprocess.Popen[bytes], Process]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return child, next(one for one in process_tree.descendants(os.getpid()) if one.pid == child.pid)

    (daemon, of_daemon), (rank, of_rank), (helper, of_helper), (joined, _) = (start() for _ in range(4))
    launched = Launched([of_daemon], [of_rank], [of_helper])
    monkeypatch.setattr(mpi_job, "launched", lambda: launched)
    monkeypatch.setattr(mpi_job, "_joined", [joined])
    try:
        assert mpi_job.processes() == [joined.pid, daemon.pid, rank.pid]
        asyncio.run(mpi_job.end(Deadline(5)))
        assert [child.wait(5) for child in (rank, helper, joined)] == [-signal.SIGKILL] * 3
        assert daemon.poll() is None
    finally:
        for child in (daemon, rank, helper, joined):
            child.kill()
            child.wait()


def test_nothing_was_launched() -> None:
    assert mpi_job.launched() == ([], [], [])
