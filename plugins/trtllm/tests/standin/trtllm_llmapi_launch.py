"""`trtllm-llmapi-launch COMMAND`, run once per rank by mpirun or srun.

Rank 0 becomes the leader of the ranks and runs the command beside itself, without MPI's variables; the others become
its workers. The command is under guard: a group of its own, SIGTERM when the launcher dies, SIGKILL after a grace.
With `TLLM_STANDIN_OLD_LAUNCHER=1` it is an unsupervised background process, as in releases before the guard.

Nothing here may import `tensorrt_llm`: that would begin MPI in a process that is no rank.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

PR_SET_PDEATHSIG = 1
GRACE_S = 10.0
MPI_PREFIXES = (
    "OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "UCX_", "I_MPI_", "HYDRA_", "KMP_", "MPICH_", "MV2_", "CRAY_",
)  # fmt: skip
RANK_VARIABLES = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")
LEADER = [sys.executable, "-m", "tensorrt_llm.llmapi.mgmn_leader_node"]
WORKER = [sys.executable, "-m", "tensorrt_llm.llmapi.mgmn_worker_node"]


def _guard(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run the command in a group of its own; SIGTERM, also at the launcher's death, ends it; after a grace SIGKILL.

    Returns its status, and whether it was ended.
    """
    os.setpgid(0, 0)
    ended = threading.Event()
    child = subprocess.Popen(command, env=environment, preexec_fn=lambda: os.setpgid(0, 0))

    def end(*_: object) -> None:
        ended.set()
        child.send_signal(signal.SIGTERM)

        def kill() -> None:
            time.sleep(GRACE_S)
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return child.wait(), ended.is_set()


def _run_command(command: list[str], environment: dict[str, str]) -> None:
    """Run the command, then stop the leader, unless that one ended first; leave with the command's status."""
    if os.environ.get("TLLM_STANDIN_OLD_LAUNCHER") == "1":
        status, ended = subprocess.call(command, env=environment), False
    else:
        status, ended = _guard(command, environment)
    if not ended:
        subprocess.call([*LEADER, "--action", "stop"], env=environment)
    os._exit(status if status >= 0 else 128 - status)


def main() -> None:
    """Become what this rank has to be."""
    command = sys.argv[1:]
    if not command:
        raise SystemExit("usage: trtllm-llmapi-launch COMMAND [ARGUMENT …]")
    rank = int(next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)), "0"))
    os.environ["TLLM_SPAWN_PROXY_PROCESS"] = "1"
    os.environ.pop("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY", None)
    if rank:
        os.execv(WORKER[0], WORKER)
    os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"] = secrets.token_hex(32)
    address = f"ipc://{tempfile.gettempdir()}/rpc_test_{uuid.uuid4()}"
    os.environ.setdefault("TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR", address)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(MPI_PREFIXES)}
    beside = os.fork()
    if beside == 0:
        _run_command(command, clean)
    leader_status = subprocess.call(LEADER)
    if leader_status and os.environ.get("TLLM_STANDIN_OLD_LAUNCHER") == "1":
        raise SystemExit(leader_status)
    if leader_status:
        # The leader died with the world; the command has nobody to talk to.
        os.kill(beside, signal.SIGTERM)
    _, wait_status = os.waitpid(beside, 0)
    raise SystemExit(os.waitstatus_to_exitcode(wait_status) or leader_status)


if __name__ == "__main__":
    main()
