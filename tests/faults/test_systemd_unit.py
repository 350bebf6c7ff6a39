"""The example unit, run by systemd itself as PID 1 of private namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_worker.testing.cluster import free_port

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
CACHE = "/var/cache/dynamo-worker"

#: Runs inside: starts the unit, kills its supervisor, waits until systemd has started it again, and stops it.
DRIVER = f"""
import json, os, signal, subprocess, time

def show(name):
    asked = ["systemctl", "show", "-p", name, "--value", "worker"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()

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
with open("/mnt/found.json", "w") as file:
    json.dump(found, file)
subprocess.run(["systemctl", "--force", "--force", "poweroff"])
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
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || exit 77
mount --bind /mnt/passwd /etc/passwd
cp /mnt/*.service /mnt/*.target /etc/systemd/system/
container=other exec /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=no </dev/null
"""


def unit() -> str:
    """Return the example unit for this machine: our Python, and discovery without a server."""
    hosts = " ".join(f"DYN_{name}_HOST=127.0.0.1" for name in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE"))
    port = free_port()
    # A home directory may hold what these tests run.
    seen = " ".join(f"-{place}" for place in {sys.base_prefix, sys.prefix, str(ROOT)})
    changes = {
        "ExecStart": f"{sys.executable} -m dynamo_worker --engine echo --system-port {port} --grace-period 0",
        "ProtectHome": f"tmpfs\nBindReadOnlyPaths={seen}",
        "Environment=DYN_DISCOVERY_BACKEND": f"file DYN_FILE_KV={CACHE}/kv {hosts}",
        "After": "sysinit.target",
        "Wants": "sysinit.target",
    }
    lines = []
    for line in (ROOT / "deploy/systemd/dynamo-worker.service").read_text().splitlines():
        name = next((each for each in changes if line.startswith(f"{each}=")), None)
        lines.append(line if name is None else f"{name}={changes[name]}")
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEMD.exists() or shutil.which("unshare") is None, reason="root runs systemd's own PID 1"
)
def test_a_worker_whose_supervisor_is_killed_leaves_discovery_at_once(tmp_path: Path) -> None:
    (tmp_path / "worker.service").write_text(unit())
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "passwd").write_text("root:x:0:0::/root:/bin/sh\ndynamo:x:1000:1000::/nonexistent:/bin/false\n")
    (tmp_path / "test.target").write_text("[Unit]\nRequires=driver.service\nAfter=driver.service\n")
    driver = f"[Service]\nType=oneshot\nTimeoutStartSec=60\nExecStart={sys.executable} /mnt/driver.py\n"
    (tmp_path / "driver.service").write_text(f"[Unit]\nDefaultDependencies=no\n{driver}")
    command = ["unshare", "--mount", "bash", "-c", OUTER, "outer", str(tmp_path), BOOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    if done.returncode == 77 or "unshare: " in done.stderr:
        pytest.skip(f"no namespaces with cgroups of their own here: {done.stderr[-300:]}")
    found = json.loads((tmp_path / "found.json").read_text())
    print(f"\n{found}")
    assert found["start"] == 0
    assert found["entries"] > 0
    assert found["out_s"] < 2, "the lease of the file backend takes 10 s"
    assert (found["restarts"], found["result"], found["left"]) == ("1", "success", 0)
