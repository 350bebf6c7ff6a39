"""What is published: one version, a licence in every package, bounds where internals are patched, workflows."""

from __future__ import annotations

import ast
import re
import sys
from email import message_from_string
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from dynamo_worker import __version__

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
PACKAGES = [ROOT / "core", *PLUGINS, ROOT / "examples/reverse-engine"]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
NOXFILE = (ROOT / "noxfile.py").read_text()


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def requirements(package: Path) -> list[Requirement]:
    """Return all that a package requires, extras included; Python 3.10 has no parser for TOML."""
    lists = re.findall(
        r"^\w+ = \[([^\]{}]*(?:\[[^\]]*\][^\]{}]*)*)\]$", (package / "pyproject.toml").read_text(), re.MULTILINE
    )
    texts = [text for listed in lists for text in re.findall(r'"([^"]+)"', listed)]
    return [Requirement(text) for text in texts if re.fullmatch(r"[a-z][\w-]*(\[\w+\])?[<>=!][^/]*", text)]


def test_the_installed_metadata_is_that_of_the_source() -> None:
    assert distribution("dynamo-worker").version == __version__, "install the core again: `pip install -e ./core`"


@pytest.mark.parametrize("package", PACKAGES, ids=names(PACKAGES))
def test_every_package_has_the_licence(package: Path) -> None:
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    text = (package / "pyproject.toml").read_text()
    assert 'license-files = ["LICENSE"]' in text
    assert "authors = [" in text


@pytest.mark.parametrize("package", PLUGINS, ids=names(PLUGINS))
def test_the_version_stands_in_one_place(package: Path) -> None:
    assert 'path = "../../core/src/dynamo_worker/__init__.py"' in (package / "pyproject.toml").read_text()
    assert not [path for path in package.glob("src/*/*.py") if "__version__" in path.read_text()]


@pytest.mark.parametrize("package", PACKAGES[1:], ids=names(PACKAGES[1:]))
def test_plugins_take_this_version_of_the_core_and_no_later_minor(package: Path) -> None:
    core = next(requirement for requirement in requirements(package) if requirement.name == "dynamo-worker")
    assert core.specifier.contains(__version__)
    major, minor, _ = __version__.split(".")
    assert not core.specifier.contains(f"{major}.{int(minor) + 1}.0")


@pytest.mark.parametrize("package", PLUGINS, ids=names(PLUGINS))
def test_engines_whose_internals_are_used_have_upper_bounds(package: Path) -> None:
    engines = [requirement for requirement in requirements(package) if requirement.name.startswith(package.name)]
    assert engines
    for requirement in engines:
        assert {"<", ">="} == {clause.operator for clause in requirement.specifier}, requirement


@pytest.mark.parametrize("package", PLUGINS, ids=names(PLUGINS))
def test_the_core_has_an_extra_for_every_engine(package: Path) -> None:
    wanted = f"dynamo-worker-{package.name}"
    (extra,) = (requirement for requirement in requirements(ROOT / "core") if requirement.name == wanted)
    assert extra.extras == {"cuda"}
    assert extra.specifier.contains(__version__)


def test_what_the_core_imports_is_declared() -> None:
    """What comes along with another package may be gone with its next version."""
    declared = {requirement.name.replace("-", "_") for requirement in requirements(ROOT / "core")}
    modules = {"dynamo": "ai_dynamo_runtime", "yaml": "pyyaml"}
    # An engine brings these: the test kit makes it a tiny model with them.
    of_engines = {"torch", "transformers", "tokenizers", "safetensors"}
    for_type_checkers = {"typing_extensions"}
    imported = set()
    for path in (ROOT / "core/src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    undeclared = {modules.get(name, name) for name in imported - {*sys.stdlib_module_names, "dynamo_worker"}} - declared
    assert undeclared <= of_engines | for_type_checkers


@pytest.mark.parametrize("package", PACKAGES, ids=names(PACKAGES))
def test_readmes_have_no_links_into_the_repository(package: Path) -> None:
    """A package index shows them without the repository around them."""
    links = re.findall(r"\]\(([^)]+)\)", (package / "README.md").read_text())
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_changelog_has_this_version_and_its_date() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d{{2}}-\d{{2}}$", text, re.MULTILINE)
    assert text.index("## [Unreleased]") < text.index(f"## [{__version__}]")


def listed(name: str) -> list[str]:
    """Return a list of strings in the noxfile."""
    found = re.search(rf"^{name} = \[(.*)\]$", NOXFILE, re.MULTILINE)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


def test_every_plugin_is_built_and_tested() -> None:
    assert sorted(listed("ENGINES")) == names(PLUGINS)


def test_workflows_have_every_engine_and_every_python() -> None:
    matrix = {
        name: job["strategy"]["matrix"]
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text())["jobs"].items()
    }
    assert matrix["pythons"]["python"] == listed("PYTHONS")
    assert matrix["tests"]["suite"] == ["core", *listed("ENGINES")]
    assert matrix["gpu"]["suite"] == listed("ENGINES")


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_workflows_call_nox_and_nothing_else(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 180
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands[0] == "pipx install nox[uv]"
        assert len(commands) == 2
        assert commands[1].startswith("nox -s ")


def test_gpu_tests_run_on_runners_with_a_gpu_only() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())["jobs"]
    assert "gpu" in jobs["gpu"]["runs-on"]


def test_the_metadata_of_a_wheel_is_readable() -> None:
    metadata = message_from_string(distribution("dynamo-worker").read_text("METADATA") or "")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
