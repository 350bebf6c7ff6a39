"""`dynamo-worker new`: what it writes, and what it refuses to."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dynamo_worker
from dynamo_worker import API_VERSION
from dynamo_worker.cli import main, new, package_writer
from dynamo_worker.cli.package_writer import TEMPLATES, write
from dynamo_worker.cli.plugin_names import PluginNames
from dynamo_worker.errors import UsageError, WorkerError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = Path(dynamo_worker.__file__).parent / "templates"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty directory, which packages are written to by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=TEMPLATES)
def package(request, tmp_path):
    """Return a package that is written from each template."""
    write(TEMPLATES[request.param], PluginNames.of("fast-llm"), tmp_path / "package")
    return tmp_path / "package"


def everything(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def refused(capsys, *arguments, code=2):
    assert main.main(["new", *arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


# --- Names


def test_names():
    assert PluginNames.of("acme") == PluginNames("acme", "dynamo-worker-acme", "dynamo_worker_acme", "Acme")
    assert PluginNames.of("fast_llm-2") == PluginNames(
        "fast_llm-2", "dynamo-worker-fast-llm-2", "dynamo_worker_fast_llm_2", "FastLlm2"
    )


@pytest.mark.parametrize("name", ["", "Acme", "2fast", "a b", "a.b", "-a", "a-", "a--b", "a/b", "../a", "ümla", "a\n"])
def test_a_name_that_is_not_valid_is_refused(capsys, tmp_path, name):
    assert "is no name for an engine" in refused(capsys, "--", name)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(("name", "meant"), [("My Engine", "my-engine"), ("2fast", "fast"), ("a--b", "a-b")])
def test_the_nearest_name_is_suggested(name, meant):
    with pytest.raises(UsageError, match=f", did you mean {meant}\\?"):
        PluginNames.of(name)


def test_a_name_has_a_bound():
    PluginNames.of("a" * 40)
    with pytest.raises(UsageError, match="has 41 characters; at most 40"):
        PluginNames.of("a" * 41)


def test_the_name_of_a_package_is_not_that_of_an_engine():
    with pytest.raises(UsageError) as caught:
        PluginNames.of("dynamo-worker-acme")
    assert caught.value.hint == "dynamo-worker new acme"


def test_the_name_of_an_installed_engine_is_refused(capsys):
    assert "there is an engine 'echo' already, from dynamo-worker " in refused(capsys, "echo")


def test_the_name_of_an_installed_package_is_refused(capsys, tmp_path, monkeypatch):
    metadata = tmp_path / "dynamo_worker_taken-1.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: dynamo-worker-taken\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "the package dynamo-worker-taken 1.5 is installed already" in refused(capsys, "taken")


def test_the_name_of_an_importable_module_is_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "dynamo_worker_hidden.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "there is a module dynamo_worker_hidden already" in refused(capsys, "hidden")


@pytest.mark.parametrize("name", ["json", "pluggy"])
def test_an_engine_may_be_named_after_the_library_that_it_wraps(name):
    names = PluginNames.of(name)
    names.refuse_taken()
    assert names.module == f"dynamo_worker_{name}"  # hides nothing


# --- Writing


def test_it_says_what_it_has_written_and_what_comes_next(capsys, tmp_path):
    assert main.main(["new", "fast-llm"]) == 0
    output = capsys.readouterr().out
    written = [str(path.relative_to(tmp_path / "dynamo-worker-fast-llm")) for path in tmp_path.rglob("*.*")]
    assert "pyproject.toml" in written
    assert ".gitignore" in written
    for path in written:
        if (tmp_path / "dynamo-worker-fast-llm" / path).is_file():
            assert f"\n  {path}\n" in output
    *_, install, check, serve = re.findall(r"^  (.+)$", output, re.MULTILINE)
    assert re.fullmatch(r"cd dynamo-worker-fast-llm && (uv )?pip install -e '.\[test\]'", install)
    assert check == "dynamo-worker check fast-llm --conformance"
    assert serve == "dynamo-worker --engine fast-llm --frontend"


@pytest.mark.parametrize(
    ("place", "install"),
    [
        ("dynamo-worker/uv-receipt.toml", "uv venv && uv pip install -e '.[test]'"),
        ("archive-v0/pyvenv.cfg", "uv venv && uv pip install -e '.[test]'"),
        ("dynamo-worker/pipx_metadata.json", "python3 -m venv .venv && .venv/bin/pip install -e '.[test]'"),
    ],
)
def test_a_tool_in_an_environment_of_its_own_installs_into_another_one(tmp_path, monkeypatch, place, install):
    parent, file = place.split("/")
    prefix = tmp_path / parent / "w6dN"
    prefix.mkdir(parents=True)
    (prefix / file).touch()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    first, *others = new.next_commands(PluginNames.of("acme"), Path("a b"))
    assert first == f"cd 'a b' && {install}"
    assert all(command.startswith(".venv/bin/dynamo-worker ") for command in others)


def test_an_existing_directory_is_left_alone(capsys, tmp_path):
    (tmp_path / "notes").write_text("mine")
    error = refused(capsys, "acme", "--directory", str(tmp_path))
    assert "exists and is not empty: it has notes" in error
    assert everything(tmp_path) == ["notes"]


def test_a_file_in_the_place_of_the_directory_is_left_alone(capsys, tmp_path):
    (tmp_path / "acme").write_text("mine")
    assert "is a file" in refused(capsys, "acme", "--directory", str(tmp_path / "acme"))
    assert (tmp_path / "acme").read_text() == "mine"


def test_an_empty_repository_will_do(capsys, tmp_path):
    (tmp_path / ".git").mkdir()
    assert main.main(["new", "acme", "--directory", str(tmp_path)]) == 0
    assert (tmp_path / "pyproject.toml").exists()


def test_missing_directories_are_made(tmp_path):
    assert main.main(["new", "acme", "--directory", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "pyproject.toml").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_an_error(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, "acme", "--directory", str(tmp_path / "new"), code=1)


@pytest.mark.parametrize("place", ["/proc/acme", "/dev/null/acme"])
def test_a_place_where_nothing_can_be_made_is_an_error(capsys, place):
    error = refused(capsys, "acme", "--directory", place, code=1 if place.startswith("/proc") else 2)
    assert place in error


def test_nothing_is_left_of_a_package_that_cannot_be_written_whole(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    files = list(TEMPLATES["thread"].files())

    class Broken:
        def files(self):
            yield from files[:6]
            yield Path("pyproject.toml/impossible"), ""  # below a file

    with pytest.raises(WorkerError, match="cannot write"):
        write(Broken(), PluginNames.of("acme"), tmp_path)
    assert everything(tmp_path) == [".git"]


def test_an_unknown_template_names_the_known_ones(capsys):
    error = refused(capsys, "acme", "--template", "gpu")
    assert all(name in error for name in TEMPLATES)


def test_help_says_what_each_template_is_for(capsys):
    with pytest.raises(SystemExit):
        main.main(["new", "--help"])
    output = capsys.readouterr().out
    for name, template in TEMPLATES.items():
        assert re.search(rf"{name} +{re.escape(template.summary)}", output)


def test_the_tutorial_shows_what_it_says(capsys, monkeypatch):
    monkeypatch.setattr(new, "_installer", lambda: "pip")
    assert main.main(["new", "acme"]) == 0
    text = (Path(__file__).parents[3] / "docs" / "tutorial.md").read_text()
    (shown,) = re.findall(r"<!-- example:new -->\n```text\n(.*?)```", text, re.DOTALL)
    assert shown == capsys.readouterr().out


# --- The packages


def test_every_source_is_in_some_template():
    layers = {layer for template in TEMPLATES.values() for layer in template.layers}
    assert {path.name for path in SOURCES.iterdir() if path.name != "__pycache__"} == layers


def test_the_template_is_the_package_of_its_own_name(tmp_path):
    """What the tools check in the sources is what an author gets."""
    for template in TEMPLATES.values():
        for path, text in template.files():
            assert PluginNames.of("acme").put_into(text) == text, path


def test_no_name_of_the_template_is_left(package):
    for path in package.rglob("*"):
        assert "acme" not in str(path.relative_to(package)).lower()
        if path.is_file():
            assert "acme" not in path.read_text().lower(), path


def test_every_module_can_be_compiled_and_fits_its_lines(package):
    modules = list(package.rglob("*.py"))
    assert len(modules) >= 8
    for path in modules:
        ast.parse(path.read_text())


def test_there_is_one_place_for_the_engine(package):
    places = [path for path in package.rglob("*.py") if "YOUR ENGINE HERE" in path.read_text()]
    assert len(places) == 1
    assert places[0].read_text().count("YOUR ENGINE HERE") == 1


def test_the_package_is_small(package):
    """Ten minutes to read."""
    lines = sum(len(path.read_text().splitlines()) for path in package.glob("src/*/*.py"))
    assert lines < 500


def test_the_readme_names_every_file_and_no_other(package):
    text = (package / "README.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert all((package / path).exists() for path in named)
    modules = {str(path.relative_to(package)) for path in package.glob("src/*/*.py")}
    assert {path for path in modules if not path.endswith("__init__.py")} <= named


def test_the_metadata(package):
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == "dynamo-worker-fast-llm"
    assert project["entry-points"] == {"dynamo_worker.engines": {"fast-llm": "dynamo_worker_fast_llm.plugin:plugin"}}
    major, minor, _ = (int(part) for part in dynamo_worker.__version__.split("."))
    (core,) = map(Requirement, project["dependencies"])
    assert str(core.specifier) == f"<{major}.{minor + 1},>={major}.{minor}"
    assert "license" not in project  # the author's choice


def test_the_plugin_declares_the_current_version_of_the_api(package):
    text = (package / "src" / "dynamo_worker_fast_llm" / "plugin.py").read_text()
    assert 'dynamo_worker_api = "{}.{}"'.format(*API_VERSION) in text


def test_the_workflows(package):
    for path in package.glob(".github/workflows/*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {}
        assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
    release = yaml.safe_load((package / ".github" / "workflows" / "release.yml").read_text())
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_caches_do_not_become_part_of_a_package(tmp_path, monkeypatch):
    cache = tmp_path / "templates" / "common" / "src" / "__pycache__" / "x.pyc"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"\xff")
    monkeypatch.setattr(package_writer, "_TEMPLATES", tmp_path / "templates")
    assert not any("__pycache__" in path.parts for path, _ in TEMPLATES["thread"].files())
