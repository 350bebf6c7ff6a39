"""What another user of the same machine can do to a worker of root's: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.testing import Cluster, Worker
from dynamo_worker.testing.cluster import free_port

from . import other_user

#: `nobody`, or any other number that is not root's.
OTHER = 65534
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def second_user() -> None:
    """Skip the test where there is no second user to play."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as a second user")
    try:
        as_other("true")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no second user can be played here: {error}")


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a directory such as /tmp: everybody may write there, and is kept from what belongs to others."""
    place = Path(tempfile.mkdtemp(prefix="dwu-", dir="/tmp"))
    place.chmod(0o1777)
    yield place
    shutil.rmtree(place)


def misbehave(pids: list[int], paths: list[Path]) -> list[str]:
    """Do as the other user whatever is bad for these processes and paths; return what succeeded."""
    sockets = []
    for pid in pids:
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{number}"))
                sockets += [match[1]] if match else []
    task = {"user": OTHER, "pids": pids, "paths": [str(path) for path in paths], "sockets": sockets}
    # By its text: the tests may lie where the other user cannot read.
    code = Path(other_user.__file__).read_text(encoding="utf-8")
    interpreter = shutil.which("python3", path="/usr/bin:/bin") or os.path.realpath(sys.executable)
    done = subprocess.run(
        [interpreter, "-c", code], input=json.dumps(task), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    succeeded: list[str] = json.loads(done.stdout)
    return succeeded


def as_other(code: str, *arguments: Path | str) -> None:
    """Run a script as the other user."""
    command = ["sh", "-euc", code, "sh", *map(str, arguments)]
    subprocess.run(command, user=OTHER, group=OTHER, extra_groups=[], cwd="/", check=True)


def start(cluster: Cluster, shared: Path, *arguments: str, **environment: str | None) -> Worker:
    frontend = ["--frontend", f"127.0.0.1:{free_port()}", "--grace-period", "0"]
    return cluster.start_worker(*frontend, *arguments, TMPDIR=str(shared), **environment)


@pytest.mark.parametrize("discovery", ["of its own", "shared"])
def test_another_user_reads_writes_and_kills_nothing(cluster: Cluster, shared: Path, discovery: str) -> None:
    before = set(SHARED_MEMORY.iterdir())
    root = shared / "discovery"
    environment: dict[str, Any] = {"DYN_FILE_KV": None if discovery == "of its own" else str(root)}
    worker = start(cluster, shared, "--process-tree", **environment).wait_ready()
    pids = [worker.pid, *worker.children()]
    paths = [worker.run_dir, *({root} if discovery == "shared" else ())]
    segments = [path for path in SHARED_MEMORY.iterdir() if path not in before]
    assert len(pids) >= 6, worker.children()  # supervisor, guardian, worker, frontend, two of the engine
    assert segments
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*paths, *segments))
    assert misbehave(pids, [*paths, *segments]) == []
    worker.stop()
    assert [path.name for path in shared.iterdir()] == (["discovery"] if discovery == "shared" else [])


def test_what_another_user_can_do_would_be_noticed(shared: Path) -> None:
    """The attempts are real ones: they succeed against what belongs to that user."""
    place = shared / "open"
    place.mkdir()
    (place / "file").write_text("secret")
    (place / "file").chmod(0o666)
    place.chmod(0o777)
    with subprocess.Popen(["sleep", "60"], user=OTHER, group=OTHER, extra_groups=[]) as process:
        done = "\n".join(misbehave([process.pid], [place]))
        assert process.wait() == -9
    for what in ("SIGKILL to", f"list {place}", f"write into {place}", f"read {place}/file", f"remove {place}/file"):
        assert what in done, done


PLANTS = {
    "a directory of the same name": "mkdir -m 0777 {path}; touch {path}/owner",
    "a link": "ln -s {victim} {path}",
    "a file": "echo '{{}}' >{path}",
    "a pipe": "mkfifo -m 0666 {path}",
}


def plant(kind: str, path: Path, victim: Path) -> None:
    as_other(PLANTS[kind].format(path=path, victim=victim))


@pytest.mark.parametrize("kind", PLANTS)
def test_what_is_planted_where_a_worker_comes_to_lie(cluster: Cluster, shared: Path, kind: str) -> None:
    """Run directories of its own and of workers before it, its cache, its discovery directory's drafts."""
    victim = shared / "victim"
    victim.mkdir(0o755)
    (victim / "precious").write_text("still there")
    planted = [
        shared / "torchinductor_root",
        shared / "dw-1-000000",
        *(shared / f"dw-{n}-abcdef" for n in range(2, 30)),
    ]
    for path in planted:
        plant(kind, path, victim)
    worker = start(cluster, shared, DYN_FILE_KV=None, HOME=str(victim), XDG_CACHE_HOME=None).wait_ready()
    assert worker.run_dir not in planted
    environment = Path(f"/proc/{worker.worker_pid}/environ").read_bytes().decode().split("\0")
    cache = next(line for line in environment if line.startswith("TORCHINDUCTOR_CACHE_DIR=")).partition("=")[2]
    # The one in the home directory: who looked up that of /tmp would run what another user puts there.
    assert cache.startswith(f"{victim}/.cache/dynamo-worker/")
    assert stat.S_IMODE(os.stat(cache).st_mode) == 0o700
    worker.stop()
    assert (victim / "precious").read_text() == "still there"
    for path in planted:
        assert path.lstat().st_uid == OTHER  # they are not ours to remove
        if kind == "a directory of the same name":
            assert os.listdir(path) == ["owner"]


@pytest.mark.parametrize("kind", PLANTS)
def test_a_discovery_directory_that_was_planted_is_refused(cluster: Cluster, shared: Path, kind: str) -> None:
    victim = shared / "victim"
    victim.mkdir(0o755)
    root = shared / "dynamo_store_kv"
    plant(kind, root, victim)
    worker = start(cluster, shared, DYN_FILE_KV=str(root))
    assert worker.wait_gone() == 2, worker.log
    # With fs.protected_symlinks=1, as most distributions set it, the kernel refuses to follow the link.
    said = {
        "a directory of the same name": "belongs to another user",
        "a link": "(belongs to another user|cannot be created: Permission denied)",
    }.get(kind, "cannot be created")
    assert re.search(rf'error="the discovery directory {root}.*{said}', worker.log), worker.log
    assert 'next="' in worker.log
    assert os.listdir(victim) == []


@pytest.mark.parametrize("kind", ["theirs", "open to them"])
def test_a_discovery_directory_below_one_of_another_user_is_refused(cluster: Cluster, shared: Path, kind: str) -> None:
    """Who may rename it can put another one in its place."""
    above = shared / "above"
    if kind == "theirs":
        as_other('mkdir -m 0777 "$1"', above)
    else:
        above.mkdir()
        above.chmod(0o777)
    worker = start(cluster, shared, DYN_FILE_KV=str(above / "discovery"))
    assert worker.wait_gone() == 2, worker.log
    said = "belongs to another user" if kind == "theirs" else "which has no sticky bit"
    assert re.search(rf'error="the discovery directory .* is not safe, .*{above}.*{said}', worker.log), worker.log
    assert os.listdir(above) == []
