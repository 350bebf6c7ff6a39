"""The project's tasks: `nox` runs what a change has to pass, `nox -s NAME` one of them, `nox -l` lists them.

CI calls nothing but these.
"""

from __future__ import annotations

import email
import json
import os
import pathlib
import random
import zipfile

import nox
import nox.command

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "deploy", "docs", "example", "tests(core)", "pythons"]

ROOT = pathlib.Path(__file__).parent
#: What `ai-dynamo-runtime` supports.
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
#: Every engine with a plugin in `plugins/NAME`. Its tests on a CPU install the `cpu` extra, or the stand-in for the
#: engine in `tests/standin`, with the versions of `constraints.txt`, without what `overrides.txt` names, and then run
#: `tests/install_shims.py` if there is one. Its tests on a GPU install the `cuda` extra.
ENGINES = ["vllm", "sglang", "trtllm", "dynamo", "transformers", "server"]
#: Those that bring no engine along, but run what is installed otherwise: they have nothing for a GPU of their own.
BRINGS_NO_ENGINE = {"server"}
#: What `dynamo-worker new` writes packages from.
TEMPLATES = ["process", "thread", "server"]
PYPROJECT = nox.project.load_toml("pyproject.toml")
TEST = nox.project.dependency_groups(PYPROJECT, "test")
LINT = nox.project.dependency_groups(PYPROJECT, "lint")
TYPES = nox.project.dependency_groups(PYPROJECT, "types")
DEPLOY = nox.project.dependency_groups(PYPROJECT, "deploy")
SITE = nox.project.dependency_groups(PYPROJECT, "site")
BUILD = nox.project.dependency_groups(PYPROJECT, "build")
#: Whether the conformance kit finds each of many bugs: an engine of its own for each, for minutes.
SEEDED_BUGS = "tests/conformance/test_seeded_bugs.py"
#: What a review asks of deploy/; `tests(core)` has these tests, too.
MANIFESTS = [f"tests/unit/test_{name}.py" for name in ("deploy", "manifests", "unit_file")]
#: As many processes as there are cores run tests of workers side by side. ("auto" would count physical cores.)
PROCESSES = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]


def _install(session: nox.Session, *packages: str, compiled: bool = True) -> None:
    """Install packages, the core editable.

    :param compiled: whether to compile them: the first imports take twice as long without bytecode. Of an engine and
        its libraries most is never imported, and compiling all of it takes more than a minute.
    """
    # uv looks for local wheels (a CPU build of torch, for one) where pip is told to.
    if os.environ.get("PIP_FIND_LINKS"):
        session.env.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
    if compiled:
        session.env["UV_COMPILE_BYTECODE"] = "1"
    session.env["PYTHONDONTWRITEBYTECODE"] = None
    session.install("-e", "./core[media,testing]", *packages)


@nox.session
@nox.parametrize("suite", ["core", *ENGINES], ids=["core", *ENGINES])
def tests(session: nox.Session, suite: str) -> None:
    """Run all tests of the core or of one engine: `nox -s "tests(core)" -- tests/unit -k settings`."""
    if suite == "core":
        _install(session, *TEST)
        _run_core_tests(session, SEEDED_BUGS, "tests/integration", "tests/faults")
        return
    plugin = f"plugins/{suite}"
    tests = ROOT / plugin / "tests"
    pinned = ["--constraint", f"{plugin}/constraints.txt"]
    if (ROOT / plugin / "overrides.txt").exists():
        pinned += ["--override", f"{plugin}/overrides.txt"]
    standin = (tests / "standin").exists()
    extra = "test" if suite in BRINGS_NO_ENGINE else "cpu"
    engine = ["-e", plugin, "-e", f"{plugin}/tests/standin"] if standin else ["-e", f"{plugin}[{extra}]"]
    _install(session, *pinned, *engine, *TEST, compiled=suite in BRINGS_NO_ENGINE)
    shims = tests / "install_shims.py"
    if shims.exists():
        session.run("python", str(shims))
    # Some tests start an engine twice in their own process, which takes a busy machine minutes.
    _pytest(session, "--timeout", "400", *(session.posargs or [str(tests)]))


def _pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest, which keeps what failed for each session apart, and says which tests took longest."""
    session.run("pytest", "-o", f"cache_dir=.pytest_cache/{session.name}", "--durations=20", *arguments)


def _run_core_tests(session: nox.Session, *others: str) -> None:
    """Run the selection of the command line; without one, the tests of single modules, and then those of workers.

    The former measure times that anything beside them would stretch. The latter mostly wait, so they run side by side.
    """
    if session.posargs:
        _pytest(session, *session.posargs)
        return
    try:
        _pytest(session, "tests/unit", "tests/conformance", f"--ignore={SEEDED_BUGS}")
    except nox.command.CommandFailed:
        if others:  # what these find is worth knowing all the same
            _pytest(session, *PROCESSES, *others)
        raise
    if others:
        _pytest(session, *PROCESSES, *others)


@nox.session
def nightly(session: nox.Session) -> None:
    """Run what takes an hour: thousands of random faults and fuzzed requests, the core's slow tests, then chaos."""
    session.notify("chaos", posargs=[])  # it runs whatever fails here
    _install(session, *TEST)
    session.env.setdefault("DYNAMO_WORKER_TEST_ROUNDS", "2000")
    session.env.setdefault("DYNAMO_WORKER_TEST_EXAMPLES", "2000")
    session.env.setdefault("DYNAMO_WORKER_TEST_SEED", str(random.SystemRandom().randrange(10**6)))
    session.env.setdefault("DYNAMO_WORKER_TEST_REPEATS", "0")
    session.run("pytest", "tests/faults/test_random.py", "tests/integration/test_fuzz.py", *session.posargs)
    session.run("pytest", "-m", "slow", "tests")


@nox.session
def chaos(session: nox.Session) -> None:
    """Run a fleet under load and random faults for 10 minutes; `-- --minutes 60 --seed 7` for longer."""
    _install(session, *TEST)
    session.run("python", "benchmarks/chaos.py", *(session.posargs or ["--minutes", "10"]))


#: The tests of what docs/security.md promises; those of the plugins run with their suites.
SECURITY = [
    *(f"tests/unit/supervisor/test_{name}.py" for name in ("discovery", "interpreter", "ledger", "removal")),
    *(f"tests/unit/supervisor/test_{name}.py" for name in ("report", "run_directory", "shared_memory", "text")),
    *(f"tests/unit/test_{name}.py" for name in ("allowed_paths", "logs")),
    *(f"tests/unit/host/test_{name}.py" for name in ("control_routes", "runtime", "status_server")),
    *(f"tests/unit/kit/test_{name}.py" for name in ("json_schema", "lora", "media", "media_hostile", "media_settings")),
    "tests/unit/kit/test_translation.py",
    "tests/integration",
]


@nox.session
def security(session: nox.Session) -> None:
    """Look for holes: bandit's rules, known vulnerabilities, what we promise, 10 000 fuzzed requests of each kind."""
    _install(session, *TEST, *LINT, "pip-audit")
    # Given a selection, ruff forgets what the configuration leaves out, and why.
    left_out = [rule for rule in PYPROJECT["tool"]["ruff"]["lint"]["ignore"] if rule[0] == "S" and rule[1:].isdigit()]
    session.run("ruff", "check", "--select", "S", "--ignore", ",".join(left_out), ".")
    _audit(session)
    # Examples have four or five requests each.
    session.env.setdefault("DYNAMO_WORKER_TEST_EXAMPLES", "2500")
    session.env.setdefault("DYNAMO_WORKER_TEST_LIVE", "0.05")
    session.run("pytest", "-s", *(session.posargs or SECURITY))


def _audit(session: nox.Session) -> None:
    """Look the installed packages up in PyPI's list of known vulnerabilities; without it, say so and go on.

    `pip-audit` itself ends well if it could look up nothing, as with a mirror that has no such list.
    """
    report = session.run("pip-audit", "--format", "json", "--skip-editable", silent=True, success_codes=[0, 1]) or ""
    try:
        packages = json.loads(report[report.index("{") : report.rindex("}") + 1])["dependencies"]
    except (ValueError, KeyError):
        session.warn(f"pip-audit SKIPPED, the list of vulnerabilities cannot be reached: {report.strip()[-200:]}")
        return
    known = [package for package in packages if "skip_reason" not in package]
    vulnerable = [f"{package['name']} {package['version']}" for package in known if package["vulns"]]
    if vulnerable:
        session.error(f"known vulnerabilities (`pip-audit` says which): {', '.join(vulnerable)}")
    if known:
        session.log(f"pip-audit: {len(known)} of {len(packages)} packages looked up, no known vulnerability")
    else:
        session.warn(f"pip-audit SKIPPED, {len(packages)} packages are unknown to the list of vulnerabilities here")


@nox.session
@nox.parametrize("suite", [name for name in ENGINES if name not in BRINGS_NO_ENGINE])
def gpu(session: nox.Session, suite: str) -> None:
    """Run the tests of one engine on this machine's GPU, whose memory has to be free again after every test."""
    _install(session, "-e", f"plugins/{suite}[cuda]", *TEST)
    session.run("pytest", *(session.posargs or [f"plugins/{suite}/tests"]))


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the tests that take seconds on every Python that is installed."""
    _install(session, *TEST)
    session.env.setdefault("DYNAMO_WORKER_TEST_EXAMPLES", "30")  # `tests(core)` has the rest
    _run_core_tests(session, "tests/integration")


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests without an engine process against the oldest supported versions of the dependencies."""
    session.env["UV_RESOLUTION"] = "lowest-direct"
    _install(session, *TEST)
    _run_core_tests(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and the CI workflows."""
    session.install(*LINT)
    ours = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    workflows = map(str, [*ours, *sorted(ROOT.glob("core/src/dynamo_worker/templates/*/.github/workflows/*.yml"))])
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def deploy(session: nox.Session) -> None:
    """Check deploy/ with Kubernetes' schemas, hadolint, a review of our own and, where installed, systemd-analyze."""
    _install(session, *TEST, *DEPLOY)
    session.run("pytest", "-rs", *(session.posargs or ["tests/deploy", *MANIFESTS]))


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
    # What `dynamo-worker new` writes: its sources are layers of packages, which mypy cannot check by themselves.
    session.run("rm", "-rf", *(f"{session.create_tmp()}/{template}" for template in TEMPLATES), external=True)
    for template in TEMPLATES:
        package = f"{session.create_tmp()}/{template}"
        session.run("dynamo-worker", "new", "typed", "--template", template, "--directory", package)
        session.run("mypy", f"{package}/src", env={"MYPYPATH": f"{package}/src"})


@nox.session
def docs(session: nox.Session) -> None:
    """Regenerate the generated parts of the documentation, or with `-- --check` only say whether they are true."""
    _install(session)
    session.run("python", "docs/generate.py", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation as a site into build/site; a link that leads nowhere fails it."""
    session.install(*SITE)
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist and the wheel of every package, check both, and install each wheel into an empty environment."""
    session.install(*BUILD)
    session.run("rm", "-rf", "dist", external=True)
    for package in ("core", *(f"plugins/{name}" for name in ENGINES), "examples/reverse-engine"):
        # The wheel is built from the sdist, so an sdist that lacks a file fails here.
        session.run("python", "-m", "build", "--installer", "uv", "--outdir", "dist", package)
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    sdists = sorted((ROOT / "dist").glob("*.tar.gz"))
    session.run("twine", "check", "--strict", *map(str, [*wheels, *sdists]))
    session.run("check-wheel-contents", *map(str, wheels))
    for wheel in wheels:
        _check_metadata(session, wheel)

    _install_wheel(session, "dynamo-worker")
    _run_installed(session, "dynamo-worker", "--version")
    _run_installed(session, "dynamo-worker", "check", "echo")
    for template in TEMPLATES:
        _check_new_package(session, template)
    _install_wheel(session, "dynamo-worker-reverse")
    _run_installed(session, "dynamo-worker-reverse", "check", "reverse")
    for engine in ENGINES:
        package = f"dynamo-worker-{engine}"
        _install_wheel(session, package)
        listed = _run_installed(session, package, "engines")
        if engine not in listed:
            session.error(f"`dynamo-worker engines` does not list {engine}, although {package} is installed: {listed}")
        if engine in BRINGS_NO_ENGINE:
            continue
        # The engine itself is an extra: without it the plugin has to say what to install.
        answer = _run_installed(session, package, "--engine", engine, "--help")
        if f"{package}[" not in answer or "Traceback" in answer:
            session.error(f"--engine {engine} without {engine} installed does not name {package}[…]: {answer}")


def _check_new_package(session: nox.Session, template: str) -> None:
    """Check that the installed core writes a package that its author can publish, and that works once installed."""
    name, package = f"new-{template}", pathlib.Path(session.create_tmp()).resolve() / template
    session.run("rm", "-rf", str(package), external=True)
    _run_installed(session, "dynamo-worker", "new", name, "--template", template, "--directory", str(package))
    session.run("python", "-m", "build", "--installer", "uv", str(package))
    built = sorted(map(str, (package / "dist").iterdir()))
    session.run("twine", "check", "--strict", *built)
    environment = str(_environment(session, "dynamo-worker"))
    session.run("uv", "pip", "install", "--quiet", "--python", environment, built[0])
    _run_installed(session, "dynamo-worker", "check", name)


def _check_metadata(session: nox.Session, wheel: pathlib.Path) -> None:
    """Check that a wheel has its license and the version of the core; the example is released by itself."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        session.error(f"{wheel.name} has no LICENSE: put a copy beside the package's pyproject.toml")
    core = next((ROOT / "dist").glob("dynamo_worker-*.whl")).name.split("-")[1]
    if metadata["Name"] != "dynamo-worker-reverse" and metadata["Version"] != core:
        session.error(f"{wheel.name}: expected the version of the core, {core}, got {metadata['Version']}")


def _environment(session: nox.Session, package: str) -> pathlib.Path:
    """Return the folder of the environment into which only this package is installed."""
    return pathlib.Path(session.create_tmp()) / package


def _install_wheel(session: nox.Session, package: str) -> None:
    """Install a built wheel into a new environment, with the core's.

    Both by their paths: of a wheel that uv finds by its name in a folder, it takes what it had unpacked of an earlier
    build of the same version.
    """
    environment = str(_environment(session, package))
    wheels = {str(next((ROOT / "dist").glob(f"{name.replace('-', '_')}-*.whl"))) for name in ("dynamo-worker", package)}
    session.run("uv", "venv", "--quiet", "--clear", environment)
    session.run("uv", "pip", "install", "--quiet", "--python", environment, *sorted(wheels))


def _run_installed(session: nox.Session, package: str, *arguments: str) -> str:
    """Run the `dynamo-worker` of an environment and return what it printed."""
    program = str(_environment(session, package).resolve() / "bin" / "dynamo-worker")
    return session.run(program, *arguments, external=True, silent=True) or ""


@nox.session
def requirements(session: nox.Session) -> None:
    """Choose anew what the image is built from: every package with its version and hashes."""
    session.install("uv")
    session.env["UV_FIND_LINKS"] = None  # a local wheel has other hashes than what others get
    build = pathlib.Path(session.create_tmp()) / "build.in"
    build.write_text("\n".join(nox.project.load_toml("core/pyproject.toml")["build-system"]["requires"]))
    for source, target in (("core/pyproject.toml", "requirements.txt"), (str(build), "build-requirements.txt")):
        options = ["--universal", "--python-version", "3.12", "--generate-hashes", "--upgrade"]
        silent = ["--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
        header = ["--custom-compile-command", "nox -s requirements"]
        output = ["--output-file", f"deploy/docker/{target}"]
        session.run("uv", "pip", "compile", *options, *silent, *header, *output, source)


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
