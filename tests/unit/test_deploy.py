"""What goes into the image is pinned: the base by its digest, every package by its hashes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
LISTS = ("requirements.txt", "build-requirements.txt")


def pins(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return the version and the hashes of each package in a list."""
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for requirement, *options in lines:
        package, version = requirement.split("==")
        found[package] = (version, options)
    return found


def declared(table: str, key: str) -> list[Requirement]:
    """Return a list of requirements in the core's pyproject.toml; Python 3.10 has no parser for it."""
    section = (ROOT / "core/pyproject.toml").read_text().split(f"[{table}]")[1]
    listed = re.search(rf"^{key} = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed[1])]


@pytest.mark.parametrize(
    ("name", "requirements"),
    [("requirements.txt", ("project", "dependencies")), ("build-requirements.txt", ("build-system", "requires"))],
)
def test_the_lists_have_what_the_core_needs(name, requirements):
    """`nox -s requirements` makes them anew."""
    pinned = pins(name)
    for requirement in declared(*requirements):
        assert requirement.specifier.contains(pinned[requirement.name][0]), requirement


@pytest.mark.parametrize("name", LISTS)
def test_every_package_has_hashes_and_comes_from_nowhere_in_particular(name):
    for package, (_, options) in pins(name).items():
        assert options, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", option) for option in options), package
    assert not re.search(r"://|--index|--find-links|file:|/\w+/", (DOCKER / name).read_text())


def test_every_stage_begins_with_the_base_or_with_another_stage():
    text = (DOCKER / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    installed = [line for line in text.splitlines() if "pip install" in line]
    assert all("--require-hashes" in line or "--no-deps --no-index" in line for line in installed)


@pytest.mark.parametrize(
    ("base", "unpinned", "code"),
    [
        ("python:3.12-slim@sha256:" + "0" * 64, "", 0),
        ("python:3.12-slim", "", 1),
        ("python:3.12-slim", "1", 0),
        ("", "", 1),
    ],
)
def test_a_base_without_a_digest_is_refused(base, unpinned, code):
    text = (DOCKER / "Dockerfile").read_text()
    check = re.search(r"^RUN (case .*?esac)$", text, re.MULTILINE | re.DOTALL)
    assert check is not None
    environment = {**os.environ, "BASE": base, "UNPINNED": unpinned}
    done = subprocess.run(["sh", "-c", check[1]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("is not pinned" in done.stderr) == ("@" not in base)
