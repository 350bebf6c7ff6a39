"""A worker's place in an MPI job, where ``mpirun`` or ``srun`` starts one worker for each rank.

A process that imports an MPI library joins the job of its environment, and only one process of each rank may. So a
worker whose engine joins in another process takes itself out first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from dynamo_worker.kit import engine_processes
from dynamo_worker.kit.engine_processes import Launched

if TYPE_CHECKING:
    from dynamo_worker.deadline import Deadline

#: Variables with which launchers tell a process its place in a job.
_OF_A_JOB: Final = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "I_MPI_", "HYDRA_", "MPICH_", "MV2_", "CRAY_")
#: Settings of Open MPI with the same prefix, except those about the daemon of a job.
_SETTING, _OF_ITS_DAEMON = "OMPI_MCA_", ("OMPI_MCA_orte_", "OMPI_MCA_ess")
_RANKS: Final = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")
_SIZES: Final = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

#: Name of Open MPI's daemon, which starts the ranks.
_DAEMON: Final = "orted"

#: What :func:`leave` took out of the environment.
_place: dict[str, str] = {}
#: What :func:`join` has started.
_joined: list[subprocess.Popen[bytes]] = []


def leave() -> None:
    """Take this process out of the job; a process that :func:`join` starts takes its place. Does nothing twice."""
    if size() > 1:
        for name in list(os.environ):
            is_setting = name.startswith(_SETTING) and not name.startswith(_OF_ITS_DAEMON)
            if name.startswith(_OF_A_JOB) and not is_setting:
                _place[name] = os.environ.pop(name)


def left() -> bool:
    """Return whether this process has left a job."""
    return bool(_place)


def join(module: str) -> subprocess.Popen[bytes]:
    """Run a Python module in this worker's place in the job."""
    child = subprocess.Popen([sys.executable, "-m", module], env={**os.environ, **_place})
    _joined.append(child)
    return child


def rank() -> int:
    """Return this worker's rank in the job; 0 without one."""
    return _number(_RANKS, 0)


def size() -> int:
    """Return the number of ranks in the job; 1 without one."""
    return _number(_SIZES, 1)


def launched() -> Launched:
    """Return the processes that Open MPI has started for this one: its daemon, and the ranks on this machine."""
    return Launched.by(_DAEMON)


def processes() -> list[int]:
    """Return the pids of those processes, and of the one in this worker's place."""
    ranks = launched()
    return [child.pid for child in _joined] + [process.pid for process in ranks.launchers + ranks.children]


async def end(deadline: Deadline) -> None:
    """Kill the ranks on this machine, wait until they are gone, and kill the process in this worker's place.

    Its launcher, ``mpirun`` or ``srun``, then ends the ranks on other machines.

    The daemon stays: if it were killed, Open MPI would end this process too, about a second later, with exit code 205
    (4.1.8, measured). It ends with this process.
    """
    ranks = launched()
    await engine_processes.kill(ranks.children + ranks.helpers, deadline)
    for child in _joined:
        child.kill()


def _number(names: tuple[str, ...], default: int) -> int:
    environment = {**os.environ, **_place}
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)
