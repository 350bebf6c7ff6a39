"""The example unit, run by systemd itself as PID 1 of private namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.testing import eventually
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.etcd_server import Etcd

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
CACHE = "/var/cache/dynamo-worker"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEMD.exists() or shutil.which("unshare") is None, reason="root runs systemd's own PID 1"
)

#: The beginning of what runs inside.
COMMON = """
import json, os, signal, subprocess, time

def show(name):
    asked = ["systemctl", "show", "-p", name, "--value", "worker"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
"""
#: Its end.
FINISH = """
with open("/mnt/found.json", "w") as file:
    json.dump(found, file)
subprocess.run(["systemctl", "--force", "--force", "poweroff"])
"""
#: Starts the unit, kills its supervisor, waits until systemd has started it again, and stops it.
KILL = f"""
def files():
    return {{name for _, _, names in os.walk("{CACHE}/kv") for name in names}}

found = {{"start": subprocess.run(["systemctl", "start", "worker"]).returncode, "entries": len(files())}}
entries, pid = files(), int(show("MainPID"))
if found["start"] == 0:
    since = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while entries & files() and time.monotonic() < since + 30:
        time.sleep(0.001)
    found["out_s"] = time.monotonic() - since
    while not (show("NRestarts") == "1" and show("ActiveState") == "active") and time.monotonic() < since + 40:
        time.sleep(0.05)
    found["restarts"] = show("NRestarts")
    subprocess.run(["systemctl", "stop", "worker"])
    found["result"] = show("Result")
    found["left"] = len(files())
"""
#: Starts the unit, and again while etcd is away; the test takes etcd away and brings it back as the files say.
OUTAGE = """
def tell(name):
    open(f"/mnt/{name}", "w").close()

def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)

found = {"start": subprocess.run(["systemctl", "start", "worker"]).returncode, "pid": show("MainPID")}
tell("serving")
wait(lambda: os.path.exists("/mnt/back"), 120)
found["after"] = [show(name) for name in ("ActiveState", "NRestarts", "MainPID")]
subprocess.run(["systemctl", "stop", "worker"])
tell("stopped")
wait(lambda: os.path.exists("/mnt/away"), 30)
subprocess.run(["systemctl", "start", "--no-block", "worker"])
wait(lambda: int(show("NRestarts") or 0) >= 2, 60)
tell("restarting")
wait(lambda: show("ActiveState") == "active", 60)
found["restarted"] = [show("ActiveState"), int(show("NRestarts")) >= 2]
subprocess.run(["systemctl", "stop", "worker"])
found["result"] = show("Result")
"""

#: Gives PID 1 a control group of its own, and removes it afterwards.
OUTER = """
mkdir "$1/cgroup"
mount -t cgroup2 none "$1/cgroup" || exit 77
here="$1/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)"
mkdir "$here/dw-test-$$" || exit 77
echo $$ >"$here/dw-test-$$/cgroup.procs" || exit 77
unshare --mount --pid --fork --ipc --uts --cgroup --kill-child bash -c "$2" boot "$1"
code=$?
echo $$ >"$here/cgroup.procs"
find "$here/dw-test-$$" -depth -type d -exec rmdir {} +
exit $code
"""

#: Makes what PID 1 needs, with the test's directory as /mnt.
BOOT = """
mount --bind "$1" /mnt
for place in /run /tmp /dev/shm /var/cache /etc/systemd/system; do mount -t tmpfs none $place; done
mount -t proc none /proc
# systemd sets what Debian's packages want, for the whole machine.
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys || exit 77
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || exit 77
mount --bind /mnt/passwd /etc/passwd
cp /mnt/*.service /mnt/*.target /etc/systemd/system/
container=other exec /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=no </dev/null
"""


def unit(discovery: str, *arguments: str) -> str:
    """Return the example unit for this machine: our Python, another discovery, and further arguments of the worker."""
    hosts = " ".join(f"DYN_{name}_HOST=127.0.0.1" for name in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE"))
    port = free_port()
    # A home directory may hold what these tests run.
    seen = " ".join(f"-{place}" for place in {sys.base_prefix, sys.prefix, str(ROOT)})
    changes = {
        "ExecStart": f"{sys.executable} -m dynamo_worker --engine echo --system-port {port} --grace-period 0 "
        + " ".join(arguments),
        "ProtectHome": f"tmpfs\nBindReadOnlyPaths={seen}",
        "Environment=DYN_DISCOVERY_BACKEND": f"{discovery} {hosts}",
        "After": "sysinit.target",
        "Wants": "sysinit.target",
    }
    lines = []
    for line in (ROOT / "deploy/systemd/dynamo-worker.service").read_text().splitlines():
        if line.startswith("Environment=ETCD_ENDPOINTS"):
            continue
        name = next((each for each in changes if line.startswith(f"{each}=")), None)
        lines.append(line if name is None else f"{name}={changes[name]}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def booted(directory: Path, unit_file: str, driver: str) -> Iterator[None]:
    """Boot systemd with a unit and what is to be done with it; the end of the block waits until it has powered off."""
    (directory / "worker.service").write_text(unit_file)
    (directory / "driver.py").write_text(COMMON + driver + FINISH)
    (directory / "passwd").write_text("root:x:0:0::/root:/bin/sh\ndynamo:x:1000:1000::/nonexistent:/bin/false\n")
    (directory / "test.target").write_text("[Unit]\nRequires=driver.service\nAfter=driver.service\n")
    service = f"[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart={sys.executable} /mnt/driver.py\n"
    (directory / "driver.service").write_text(f"[Unit]\nDefaultDependencies=no\n{service}")
    command = ["unshare", "--mount", "bash", "-c", OUTER, "outer", str(directory), BOOT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
            _, errors = process.communicate(timeout=90)
        finally:
            process.kill()
    if process.returncode == 77 or "unshare: " in errors:
        pytest.skip(f"no namespaces with cgroups of their own here: {errors[-300:]}")


def found(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "found.json").read_text())
    print(f"\n{result}")
    return result


def test_a_worker_whose_supervisor_is_killed_leaves_discovery_at_once(tmp_path: Path) -> None:
    with booted(tmp_path, unit(f"file DYN_FILE_KV={CACHE}/kv"), KILL):
        pass
    result = found(tmp_path)
    assert result["start"] == 0
    assert result["entries"] > 0
    assert result["out_s"] < 2, "the lease of the file backend takes 10 s"
    assert (result["restarts"], result["result"], result["left"]) == ("1", "success", 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd server is installed (Debian: etcd-server)")
def test_no_unit_fails_while_etcd_is_away(tmp_path: Path) -> None:
    """Neither one that serves, for 45 s, nor one that starts meanwhile."""
    etcd = Etcd(tmp_path / "etcd", os.environ)
    place = tmp_path / "boot"
    place.mkdir()
    try:
        text = unit(f"etcd ETCD_ENDPOINTS={etcd.url}", "--discovery-timeout", "3")
        with booted(place, text, OUTAGE):
            eventually((place / "serving").exists, 60, "the unit to serve")
            etcd.kill()
            time.sleep(45)
            etcd.start()
            (place / "back").touch()
            eventually((place / "stopped").exists, 60, "the unit to stop")
            etcd.kill()
            (place / "away").touch()
            eventually((place / "restarting").exists, 90, "systemd to start the unit again")
            etcd.start()
    finally:
        etcd.kill()
    result = found(place)
    assert result["start"] == 0
    assert result["after"] == ["active", "0", result["pid"]]
    assert result["restarted"] == ["active", True]
    assert result["result"] == "success"
