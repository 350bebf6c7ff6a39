"""What plugins may import does not change without an entry in the changelog and a newer API version."""

from __future__ import annotations

import importlib
import subprocess
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dynamo_worker
from dynamo_worker import hookspecs, requests, responses
from dynamo_worker.kit.guided_decoding import KEYS
from dynamo_worker.testing.translation import FIELDS

if TYPE_CHECKING:
    from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: A release whose API was one function and one class with a method.
RECORD = """\
# dynamo-worker 0.5.0, API 1.2
dynamo_worker.kit.chunks:usage\t(tokens: int) -> Usage
dynamo_worker.kit.lora:Loader\tclass Loader(Protocol)
dynamo_worker.kit.lora:Loader.load\t(self) -> None
"""
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n{}\n\n## [0.5.0] - 2026-12-24\n\n- `nothing`\n"


@pytest.fixture
def public_api(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("public_api")


def test_changes_since_the_last_release_are_in_the_changelog(public_api: ModuleType) -> None:
    """See docs/plugins.md, "For maintainers", for what to do when this fails."""
    last = public_api.recorded(public_api.RECORD.read_text())
    changelog = public_api.CHANGELOG.read_text()
    problems = public_api.problems(last, public_api.current(), hookspecs.API_VERSION, changelog)
    assert not problems, "\n".join(problems)


def test_the_record_is_of_the_last_release(public_api: ModuleType) -> None:
    """A release that forgets to record its API would have its names announced once more."""
    release = public_api.recorded(public_api.RECORD.read_text()).release
    headings = [line for line in public_api.CHANGELOG.read_text().splitlines() if line.startswith("## [")]
    dated = [heading for heading in headings if " - " in heading]
    if dated:
        assert dated[0].startswith(f"## [{release}]"), "run: python docs/public_api.py --record"


NEW_NAME = "dynamo_worker.kit.chunks:length"


@pytest.mark.parametrize(
    ("name", "signature", "news", "api_version", "problem"),
    [
        (NEW_NAME, "() -> int", "- `kit.chunks.length` is new.", (1, 3), None),
        (NEW_NAME, "() -> int", "- Chunks have a `length()`.", (1, 3), None),
        (NEW_NAME, "() -> int", "- Chunks have a length.", (1, 3), "added: dynamo_worker.kit.chunks.length; name it"),
        (NEW_NAME, "() -> int", "- `dynamo_worker.kit.chunks`", (1, 3), "added: dynamo_worker.kit.chunks.length"),
        (NEW_NAME, "() -> int", "- `length`", (1, 2), "API_VERSION must be above (1, 2), got (1, 2)"),
        ("dynamo_worker.kit.tokens:Reader.read", "()", "- `dynamo_worker.kit.tokens`", (1, 3), None),
        ("dynamo_worker.kit.chunks:Reader.read", "()", "- `Reader` reads chunks.", (1, 3), None),
        ("dynamo_worker.kit.chunks:usage", "()", "- `usage` needs no tokens.", (1, 3), None),
        ("dynamo_worker.kit.chunks:usage", "()", "- Nothing.", (1, 3), "changed: dynamo_worker.kit.chunks.usage; name"),
        (
            "dynamo_worker.kit.lora:Loader.load",
            "()",
            "- `Loader`",
            (1, 3),
            "changed: dynamo_worker.kit.lora.Loader.load",
        ),
        ("dynamo_worker.kit.chunks:usage", None, "- No `usage`.", (2, 0), None),
        ("dynamo_worker.kit.chunks:usage", None, "- Nothing.", (2, 0), "removed: dynamo_worker.kit.chunks.usage; name"),
        ("dynamo_worker.kit.chunks:usage", None, "- No `usage`.", (1, 3), "the major number of API_VERSION must be"),
        ("dynamo_worker.kit.chunks:usage", "(tokens: int) -> Usage", "", (1, 2), None),
    ],
)
def test_what_a_change_needs(public_api: ModuleType, name, signature, news, api_version, problem) -> None:
    last = public_api.recorded(RECORD)
    now = {**last.api, name: signature}
    if signature is None:
        del now[name]
    problems = public_api.problems(last, now, api_version, CHANGELOG.format(news))
    if problem is None:
        assert problems == []
    else:
        assert any(problem in found for found in problems), problems


def test_a_damaged_record_is_named(public_api: ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected '# dynamo-worker VERSION, API"):
        public_api.recorded("nonsense\n")


def test_what_is_read_from_the_code(public_api: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from x import y\nlog = get_logger()\n_A = 1\nB: Final = 2\nC = D = dict[str, int]\n"
        "def f(a: int, *, b: str = '') -> None: ...\nasync def g(): ...\ndef _h(): ...\n"
        "class _Base:\n    given: int\n"
        "class K(_Base, Protocol):\n    x: int = 1\n    _y: int\n    def __init__(self, x: int): ...\n"
        "    @property\n    def p(self) -> int: ...\n    def _q(self): ...\n    def __len__(self): ...\n"
    )
    assert public_api.names(path) == {
        "B": ": Final",
        "C": "",
        "D": "",
        "f": "(a: int, *, b: str='') -> None",
        "g": "async ()",
        "K": "class K(_Base, Protocol)",
        "K.given": ": int",
        "K.x": ": int = ...",
        "K.__init__": "(self, x: int)",
        "K.p": "property (self) -> int",
    }


def test_the_command_prints_the_changes() -> None:
    result = subprocess.run(
        [sys.executable, str(DOCS / "public_api.py")], capture_output=True, text=True, check=True, timeout=60
    )
    assert all(line.split(":")[0] in ("added", "removed", "changed") for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", dynamo_worker.__all__)
def test_every_name_of_the_package_resolves(name: str) -> None:
    assert getattr(dynamo_worker, name) is not None


def test_every_public_module_can_be_imported(public_api: ModuleType) -> None:
    for module, path in public_api.modules().items():
        imported = importlib.import_module(f"dynamo_worker.{module}")
        for name in public_api.names(path):
            if "." not in name:
                assert hasattr(imported, name), f"{module}.{name}"


def test_the_test_kit_sends_every_field_of_the_sections() -> None:
    assert {name: sorted(fields) for name, fields in FIELDS.items()} == {
        "sampling_options": sorted(requests.SamplingOptions.__annotations__),
        "stop_conditions": sorted(requests.StopConditions.__annotations__),
        "output_options": sorted(requests.OutputOptions.__annotations__),
    }
    assert {*KEYS, "backend"} == requests.GuidedDecoding.__annotations__.keys()


@pytest.mark.parametrize("module", [requests, responses])
def test_types_of_requests_and_chunks_resolve_at_run_time(module: ModuleType) -> None:
    """Plugins may validate with them."""
    for kind in vars(module).values():
        if typing.is_typeddict(kind):
            assert typing.get_type_hints(kind)
