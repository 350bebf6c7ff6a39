"""The packages agree on their version, bounds and license, and CI runs every engine and every Python of the noxfile."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dynamo_worker
from dynamo_worker.cli.package_writer import TEMPLATES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PLUGINS = [
    *("plugins/dynamo", "plugins/server", "plugins/sglang", "plugins/transformers", "plugins/trtllm", "plugins/vllm"),
]
PACKAGES = ["core", *PLUGINS, "examples/reverse-engine"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pyproject(package: str) -> dict:
    return tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))


def extra(package: str, name: str) -> list[Requirement]:
    return [Requirement(text) for text in pyproject(package)["project"]["optional-dependencies"][name]]


def from_noxfile(name: str) -> list[str]:
    """Return a constant of the noxfile, which cannot be imported here: nox is not installed."""
    for statement in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == name:
            return ast.literal_eval(statement.value)
    pytest.fail(f"noxfile.py defines no {name}")


def jobs() -> dict[str, dict]:
    return {
        f"{path.name}:{name}": job
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    }


def test_every_package_is_listed_here():
    found = [*(ROOT / "plugins").glob("*/pyproject.toml"), *(ROOT / "examples").glob("*/pyproject.toml")]
    assert {str(path.parent.relative_to(ROOT)) for path in found} == set(PACKAGES) - {"core"}
    assert {Path(plugin).name for plugin in PLUGINS} == set(from_noxfile("ENGINES"))
    assert list(TEMPLATES) == from_noxfile("TEMPLATES")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_carries_the_license(package):
    assert (ROOT / package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    project = pyproject(package)["project"]
    assert project["license-files"] == ["LICENSE"]
    assert project["authors"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugins_have_the_version_of_the_core(plugin):
    source = ROOT / plugin / pyproject(plugin)["tool"]["hatch"]["version"]["path"]
    assert source.resolve() == Path(dynamo_worker.__file__).resolve()


@pytest.mark.parametrize("package", [*PLUGINS, "examples/reverse-engine"])
def test_the_core_is_bounded_to_the_minor_version(package):
    major, minor, _ = (int(part) for part in dynamo_worker.__version__.split("."))
    core = Requirement(pyproject(package)["project"]["dependencies"][0])
    assert core.name == "dynamo-worker"
    assert str(core.specifier) == f"<{major}.{minor + 1},>={major}.{minor}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_core_has_an_extra_for_each_engine(plugin):
    engine = Path(plugin).name
    (found,) = extra("core", engine)
    extras = set() if engine in from_noxfile("BRINGS_NO_ENGINE") else {"cuda"}
    assert (found.name, found.extras) == (f"dynamo-worker-{engine}", extras)
    assert found.specifier == Requirement(pyproject(plugin)["project"]["dependencies"][0]).specifier


@pytest.mark.parametrize("plugin", PLUGINS)
def test_engines_have_an_upper_bound_and_the_tested_version_is_within(plugin):
    if Path(plugin).name in from_noxfile("BRINGS_NO_ENGINE"):
        pytest.skip("it brings no engine along")
    names = pyproject(plugin)["project"]["optional-dependencies"]
    bounds = [extra(plugin, name)[0] for name in sorted(names, reverse=True)]
    assert len({bound.specifier for bound in bounds}) == 1
    assert {clause.operator for clause in bounds[0].specifier} == {">=", "<"}
    constraints = (ROOT / plugin / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(rf"^{re.escape(bounds[-1].name)}==(\S+)", constraints, re.MULTILINE)
    assert pinned is not None
    assert bounds[-1].specifier.contains(pinned[1])


def test_what_the_core_imports_is_declared():
    """A package that only comes along with another one may be gone with its next version."""
    project = pyproject("core")["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["media"], *extras["testing"]]
    declared = {Requirement(text).name.replace("-", "_") for text in texts}
    distributions = {"dynamo": "ai_dynamo_runtime", "PIL": "pillow", "yaml": "pyyaml"}
    # The test kit makes them a tiny model; an image as an array is for an engine that has arrays.
    from_engines = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
    for_type_checkers = {"typing_extensions"}
    imported = set()
    templates = ROOT / "core/src/dynamo_worker/templates"
    for path in (ROOT / "core/src").rglob("*.py"):
        if templates in path.parents:  # packages of their own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - {*sys.stdlib_module_names, "dynamo_worker"} - from_engines - for_type_checkers
    assert {distributions.get(name, name) for name in foreign} <= declared


@pytest.mark.parametrize("package", PACKAGES)
def test_readme_links_work_on_a_package_index(package):
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("https://", "#"))] == []


def test_the_changelog_has_this_version_below_the_unreleased_changes():
    releases = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in releases][:2] == ["Unreleased", dynamo_worker.__version__]
    assert all(re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date) for _, date in releases[1:])


def test_workflows_run_every_engine_and_every_python_of_the_noxfile():
    found = jobs()
    engines = from_noxfile("ENGINES")
    assert found["ci.yml:engines"]["strategy"]["matrix"]["engine"] == engines
    of_gpus = [name for name in engines if name not in from_noxfile("BRINGS_NO_ENGINE")]
    assert found["nightly.yml:gpu"]["strategy"]["matrix"]["engine"] == of_gpus
    assert found["ci.yml:pythons"]["strategy"]["matrix"]["python"] == from_noxfile("PYTHONS")
    assert "gpu" in found["nightly.yml:gpu"]["runs-on"]


@pytest.mark.parametrize("name", sorted(jobs()))
def test_every_job_sets_up_and_runs_one_nox_session(name):
    job = jobs()[name]
    actions = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert actions == ["actions/checkout", "actions/setup-python"]
    assert commands[0] == "python -m pip install nox uv"
    assert len(commands) == 2
    assert commands[1].startswith("nox -s ")
    assert job["permissions"] == {"contents": "read"}
    assert job["timeout-minutes"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_no_permissions_by_default_and_keep_pull_requests_off_self_hosted_runners(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
        assert not {"pull_request", "pull_request_target", "push"} & set(triggers)
