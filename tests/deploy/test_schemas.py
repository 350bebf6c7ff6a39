"""What other programs say of deploy/: Kubernetes' schemas, hadolint, systemd-analyze. `nox -s deploy` runs this."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

# Only `nox -s deploy` installs it, and hadolint.
kubernetes_validate = pytest.importorskip("kubernetes_validate")

DEPLOY = Path(__file__).parents[2] / "deploy"
#: The oldest Kubernetes that knows every field (preStop with `sleep`), and the newest whose schemas are installed.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
OBJECTS = [*(DEPLOY / "kubernetes" / f"{name}.yaml" for name in ("worker", "frontend", "network"))]
OBJECTS.append(DEPLOY / "kubernetes-discovery" / "access.yaml")
UNIT = DEPLOY / "systemd" / "dynamo-worker.service"
#: Highest exposure that `systemd-analyze security` may find, out of 10.
MOST_EXPOSURE = 3.0


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_objects_have_the_fields_of_their_kinds(path: Path, version: str) -> None:
    for document in load(path):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_of_the_graph_is_a_pod(version: str) -> None:
    """The operator's own fields have no schema here; its `podTemplate` is one of Kubernetes' own."""
    (graph,) = load(DEPLOY / "kubernetes" / "graph.yaml")
    for component in graph["spec"]["components"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **component["podTemplate"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_a_misspelt_field_does_not_pass() -> None:
    document = next(each for each in load(OBJECTS[0]) if each["kind"] == "Deployment")
    document["spec"]["template"]["spec"]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonroot"):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which applies kustomizations, is not installed")
@pytest.mark.parametrize("name", ["kubernetes", "kubernetes-discovery"])
def test_the_kustomizations_can_be_built(name: str) -> None:
    built = subprocess.run(["kubectl", "kustomize", str(DEPLOY / name)], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(built.stdout))
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    tokens = {
        each["spec"]["template"]["spec"]["automountServiceAccountToken"]
        for each in documents
        if each["kind"] == "Deployment"
    }
    assert tokens == {name == "kubernetes-discovery"}
    assert ("ETCD_ENDPOINTS" in built.stdout) == (name == "kubernetes")


def hadolint(path: Path) -> str:
    return subprocess.run(["hadolint", "--no-color", str(path)], capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("path", sorted((DEPLOY / "docker").glob("*Dockerfile")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert hadolint(path) == ""


def test_hadolint_finds_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN cd /tmp && sudo pip install pluggy\n")
    assert {"DL3003", "DL3004", "DL3006"} <= set(re.findall(r"DL\d{4}", hadolint(wrong)))


def systemd_version() -> int:
    """Return the version of systemd-analyze; 0 if it is not installed."""
    if shutil.which("systemd-analyze") is None:
        return 0
    answer = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"systemd (\d+)", answer)
    return int(found[1]) if found else 0


# 250 was the first with ExitType= and `security --offline`.
systemd = pytest.mark.skipif(systemd_version() < 250, reason="systemd-analyze 250 or later is not installed")


def unit(directory: Path, **changes: str) -> str:
    """Write the unit with a program that exists, and other values; return its path."""
    text = UNIT.read_text()
    for name, value in {"ExecStart": "/bin/true", **changes}.items():
        text, count = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count, name
    path = directory / "dynamo-worker.service"
    path.write_text(text)
    return str(path)


def verify(path: str) -> str:
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    return "\n".join(line for line in done.stderr.splitlines() if "dynamo-worker" in line)


def exposure(path: str) -> float:
    """Return the score of `systemd-analyze security`, from 0 to 10."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done
    return float(found[1])


@systemd
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    assert verify(unit(tmp_path)) == ""
    assert "Failed to parse service exit type" in verify(unit(tmp_path, ExitType="group"))


@systemd
def test_the_unit_is_hardened(tmp_path: Path) -> None:
    assert exposure(unit(tmp_path)) <= MOST_EXPOSURE
    opened = {"SystemCallFilter": "", "CapabilityBoundingSet": "~", "ProtectSystem": "no", "NoNewPrivileges": "no"}
    assert exposure(unit(tmp_path, **opened)) > MOST_EXPOSURE
