"""What goes into the images is pinned: the bases by their digests, every package by its hashes."""

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


#: Each Dockerfile, and what its stages begin with.
STAGES = {
    "Dockerfile": ["${BASE}", "${BASE}"],
    **{f"{engine}.Dockerfile": ["${PYTHON}", "${BASE}"] for engine in ("vllm", "sglang", "trtllm")},
}


def problems(text: str, stages: list[str]) -> list[str]:
    """Return what is wrong with a Dockerfile."""
    lines = text.replace("\\\n", " ").splitlines()
    installed = [line for line in lines if "pip install" in line]
    wrong = {
        "stages": re.findall(r"^FROM (\S+)", text, re.MULTILINE) != stages,
        "unpinned packages": not all(re.search("--require-hashes|--no-deps --no-index", line) for line in installed),
        "user": re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1:] != ["1000"],
        # A shell in front would swallow the SIGTERM.
        "entry point": not re.search(
            r'^ENTRYPOINT \["(dynamo-worker|python3", "-P", "-m", "dynamo_worker)"', text, re.MULTILINE
        ),
        "signal": "STOPSIGNAL SIGTERM" not in lines,
    }
    return [name for name, bad in wrong.items() if bad]


@pytest.mark.parametrize("name", STAGES)
def test_an_image_is_pinned_and_needs_neither_root_nor_a_shell(name):
    assert problems((DOCKER / name).read_text(), STAGES[name]) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("FROM ${BASE}\n", "FROM python:3.12-slim\n", "stages"),
        ("--no-deps --no-index", "--no-deps", "unpinned packages"),
        ("USER 1000", "USER worker", "user"),
        ("USER 1000\n", "USER 1000\nUSER 0\n", "user"),
        ('ENTRYPOINT ["dynamo-worker"]', "ENTRYPOINT dynamo-worker", "entry point"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGINT", "signal"),
    ],
)
def test_a_wrong_dockerfile_does_not_pass(old, new, problem):
    text = (DOCKER / "Dockerfile").read_text()
    assert old in text
    assert problems(text.replace(old, new), STAGES["Dockerfile"]) == [problem]


#: Plugins for whose engines nobody publishes an image to build on.
NO_IMAGE = {"dynamo", "server", "transformers"}


def test_every_engine_has_an_image():
    engines = {path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists()} - NO_IMAGE
    assert engines == {name.removesuffix(".Dockerfile") for name in STAGES} - {"Dockerfile"}
    for engine in engines:
        text = (DOCKER / f"{engine}.Dockerfile").read_text()
        assert f"COPY plugins/{engine} /src/plugin" in text
        assert f'"--engine", "{engine}"]' in text


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_image_of_an_engine_is_of_a_version_that_the_plugin_supports(engine):
    project = (ROOT / f"plugins/{engine}/pyproject.toml").read_text()
    supported = re.search(r'^cuda = \["(.*)"\]$', project, re.MULTILINE)
    tag = re.search(r"^ARG BASE=\S+:v?(\S+)$", (DOCKER / f"{engine}.Dockerfile").read_text(), re.MULTILINE)
    assert supported is not None
    assert tag is not None
    assert Requirement(supported[1]).specifier.contains(tag[1], prereleases=True)


@pytest.mark.parametrize(
    ("name", "pinned", "unpinned", "code"),
    [
        (name, pinned, unpinned, code)
        for name in STAGES
        for pinned, unpinned, code in ((True, "", 0), (False, "", 1), (False, "1", 0))
    ],
)
def test_a_base_without_a_digest_is_refused(name, pinned, unpinned, code):
    check = re.search(r"^RUN (case .*?esac)$", (DOCKER / name).read_text(), re.MULTILINE | re.DOTALL)
    assert check is not None
    digest = "@sha256:" + "0" * 64
    bases = {"BASE": "engine:1" + digest * pinned, "PYTHON": "python:3.12-slim" + digest}
    environment = {**os.environ, **bases, "UNPINNED": unpinned}
    done = subprocess.run(["sh", "-c", check[1]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("is not pinned" in done.stderr) == (not pinned)


def distribution(directory, name, version, *requires):
    metadata = directory / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in requires),
    ]
    metadata.write_text("\n".join(lines) + "\n")


def test_an_engine_keeps_its_packages_and_gets_what_the_worker_lacks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCKER))
    import install_missing

    listed = install_missing.entries(
        "# ours\na==2 \\\n    --hash=sha256:1\nB_b==3 --hash=sha256:2\nc==4 --hash=sha256:3\n"
    )
    distribution(tmp_path, "dynamo-worker", "0.2", "a>=1", "b-b>=3", "c>=1", 'd>=1; extra == "more"')
    distribution(tmp_path, "a", "1")
    distribution(tmp_path, "b.b", "2")
    found = install_missing.missing(listed, [str(tmp_path)])
    assert [line.split()[0] for line in found] == ["B_b==3", "c==4"]
    # What was installed may require more.
    distribution(tmp_path, "c", "4", "a>=2")
    (tmp_path / "b.b-2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: b.b\nVersion: 3\n")
    assert [line.split()[0] for line in install_missing.missing(listed, [str(tmp_path)])] == ["a==2"]
    distribution(tmp_path, "e", "1")
    (tmp_path / "c-4.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: c\nVersion: 4\nRequires-Dist: e>2\n"
    )
    with pytest.raises(SystemExit, match="other versions of e, which the list does not have"):
        install_missing.missing(listed, [str(tmp_path)])
