"""The documentation says what the code says: every hook, setting, exit code, state, metric and log line is there."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re
import struct
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import dynamo_worker
from dynamo_worker import Chunk, InvalidRequestError, Request, engine, hookspecs, requests, responses
from dynamo_worker import text as text_types
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.options import OPTIONS
from dynamo_worker.host.plugins.plugin_validation import hook_signatures
from dynamo_worker.host.requests.embedding_kind import MOST_ANSWER_BYTES, MOST_CHARACTERS, MOST_TOKENS, wrong_answer
from dynamo_worker.host.requests.engine_checks import AnswerCheck, EngineChecks
from dynamo_worker.host.requests.kinds import kind_of
from dynamo_worker.host.requests.text_kind import wrong_chunk
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.kit.chunks import top_logprob

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LEVELS = ("info", "warning", "error")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generate")


def test_generated_parts_are_up_to_date():
    result = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stale_part_is_named(generate: ModuleType, tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- generated:exit-codes -->\nold\n<!-- /generated -->\nafter\n")
    assert generate.stale(path) == ["exit-codes"]
    path.write_text(generate.regenerated(path.read_text()))
    assert generate.stale(path) == []
    assert path.read_text().startswith("before\n")
    assert path.read_text().endswith("-->\nafter\n")
    with pytest.raises(SystemExit, match="no generated part 'nonsense'"):
        generate.regenerated("<!-- generated:nonsense -->\n<!-- /generated -->")


@pytest.mark.parametrize("hook", hook_signatures())
def test_every_hook_has_its_exact_signature_in_the_guide(generate: ModuleType, hook: str):
    text = page("plugins.md")
    assert f"### `{hook}`\n" in text
    assert f"```python\n{generate.signature(getattr(hookspecs, hook))}\n```" in text
    for argument in hook_signatures()[hook]:
        assert f"- `{argument}`: " in text


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_example_of_a_request_table_does_what_the_page_says():
    text = page("requests.md")
    (example,) = re.findall(r"<!-- example:request-table -->\n```python\n(.*?)```\n<!-- /example -->", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(example, "requests.md", "exec"), scope)
    request: Request = json.loads(blocks(text, "json")[0])
    (expected,) = re.findall(r"It reads the request above as `(.*?)`\.", text, re.DOTALL)
    parameters = scope["parameters"]
    assert parameters(request) == ast.literal_eval(expected)
    assert parameters({"token_ids": [5] * 60}) == {"temperature": 0.7, "max_new_tokens": 40}
    assert parameters({"token_ids": [5], "stop_conditions": {"max_tokens": 0}}) is None
    guided = {"token_ids": [5], "sampling_options": {"guided_decoding": {"regex": "a+"}, "seed": 7}}
    assert parameters(guided) == {"temperature": 0.7, "pattern": "a+", "random_seed": 7, "max_new_tokens": 99}
    refused = (
        ({"sampling_options": {"min_p": 0.1}}, "sampling_options.min_p = 0.1 is not supported by this engine"),
        ({"sampling_options": {"guided_decoding": {"grammar": "x"}}}, "expected a regex, got grammar"),
        ({"sampling_options": {"nonsense": 1}}, "sampling_options.nonsense is not supported by this engine"),
        ({"token_ids": [5] * 100}, "the prompt has 100 tokens"),
    )
    for change, message in refused:
        with pytest.raises(InvalidRequestError, match=re.escape(message)):
            parameters({"token_ids": [5], **change})
    assert "sampling_options.min_p = 0.1 is not supported by this engine" in text


def test_the_example_of_an_engine_in_a_process_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = page("plugins.md")
    (example,) = re.findall(r"<!-- example:child-process -->\n(.*?)<!-- /example -->", text, re.DOTALL)
    files = blocks(example, "python")
    assert sum(len(file.splitlines()) for file in files) <= 60
    (tmp_path / "upper_engine").mkdir()
    for file in files:
        (name,) = re.findall(r"^# (upper_engine/\w+\.py): ", file)
        (tmp_path / name).write_text(file)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = importlib.import_module("upper_engine.engine").UpperEngine(None, None)

    async def main() -> None:
        info = await made.start(1)
        assert (info.vocab_size, len(list(made.processes()))) == (256, 1)
        request = {"token_ids": [5, 6, 7, 8], "stop_conditions": {"max_tokens": 3}}
        chunks = [chunk async for chunk in made.generate(request, engine.LocalContext("a"))]
        assert [chunk["token_ids"] for chunk in chunks] == [[5], [6], [7]]
        assert [chunk.get("finish_reason") for chunk in chunks] == [None, None, "length"]
        answer = AnswerCheck(EngineChecks("example"), vocab_size=256)
        for chunk in chunks:
            answer.take(chunk)
        await made.check_health()
        await made.abort("a")
        assert made.progress() >= 3
        (pid,) = made.processes()
        await made.shutdown(dynamo_worker.Deadline.after(5))
        assert not Path(f"/proc/{pid}").exists()

    try:
        asyncio.run(main())
    finally:
        for name in ("upper_engine", "upper_engine.engine"):
            sys.modules.pop(name, None)


def test_the_example_of_log_probabilities_is_a_chunk():
    (example,) = (block for block in blocks(page("requests.md"), "python") if "log_probs" in block)
    scope = {"top_logprob": top_logprob}
    exec(example, scope)
    chunk: Chunk = scope["chunk"]
    assert chunk.keys() <= Chunk.__annotations__.keys()
    assert len(chunk["token_ids"]) == len(chunk["log_probs"]) == len(chunk["top_logprobs"])
    AnswerCheck(EngineChecks("example"), vocab_size=256).take(chunk)


def test_the_example_of_a_text_engine_is_one():
    text = page("requests.md")
    (example,) = re.findall(r"<!-- example:text-engine -->\n```python\n(.*?)```\n<!-- /example -->", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(example, "requests.md", "exec"), scope)

    async def answer(**fields: Any) -> tuple[str, str, bool]:
        request = {"model": "m", "messages": [{"role": "user", "content": "one two three"}], **fields}
        chunks = [chunk async for chunk in scope["generate"](request, engine.LocalContext("1"))]
        assert [wrong_chunk(chunk, "messages") for chunk in chunks] == [None] * len(chunks)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        said = "".join(choice["delta"]["content"] for choice in choices)
        return said, choices[-1]["finish_reason"], "usage" in chunks[-1]

    assert asyncio.run(answer()) == ("three two one ", "stop", True)
    assert asyncio.run(answer(max_tokens=2, stream=True)) == ("three two ", "length", False)
    assert asyncio.run(answer(stop="two")) == ("three ", "stop", True)
    with pytest.raises(InvalidRequestError, match="seed is not supported"):
        asyncio.run(answer(seed=7))


def test_the_example_of_an_embedding_engine_is_one():
    text = page("requests.md")
    (example,) = re.findall(
        r"<!-- example:embedding-engine -->\n```python\n(.*?)```\n<!-- /example -->", text, re.DOTALL
    )
    scope: dict[str, Any] = {}
    exec(compile(example, "requests.md", "exec"), scope)
    info = asyncio.run(scope["start"](1))
    kind = kind_of(info, EngineChecks("the example"))

    async def answer(**body: Any) -> Any:
        request = kind.checked({"model": "toy", **body})
        (answer,) = [chunk async for chunk in scope["generate"](request, engine.LocalContext("1"))]
        assert wrong_answer(answer, request, info.embeddings) is None
        return [struct.unpack(f"<{len(vector) // 4}f", vector) for vector in answer["embeddings"]], answer[
            "prompt_tokens"
        ]

    assert asyncio.run(answer(input=[[3, 4], [7]])) == ([(2, 7, 4), (1, 7, 7)], 3)
    assert asyncio.run(answer(input=[3, 4], dimensions=2)) == ([(2, 7)], 2)
    assert asyncio.run(answer(**scope["canary_request"]())) == ([(1, 3, 3)], 1)
    for count, message in ((60, "more than 50 inputs need"), (101, "101 inputs are too many, at most 100")):
        with pytest.raises(InvalidRequestError, match=message):
            asyncio.run(answer(input=[[3]] * count))


def test_the_limits_of_embeddings_in_the_guide_are_those_of_the_worker():
    said = page("requests.md").replace(" ", "").replace("\n", "")
    assert f"{MOST_TOKENS}tokensor{MOST_CHARACTERS}characters" in said
    assert f"{MOST_ANSWER_BYTES // 2**20}MiBofvectors" in said


def test_the_chunks_in_the_guide_are_chunks():
    (shown,) = (block for block in blocks(page("requests.md"), "json") if "chat.completion.chunk" in block)
    chunks = [json.loads(line) for line in shown.splitlines()]
    assert [wrong_chunk(chunk, "messages") for chunk in chunks] == [None] * 3


def test_the_canary_in_the_guide_is_what_the_kit_makes():
    shown = json.loads(blocks(page("requests.md"), "json")[1])
    assert shown == canary_request(SimpleNamespace(bos_token_id=1), None)


@pytest.mark.parametrize("module", [requests, responses, text_types])
def test_every_field_of_a_request_and_a_chunk_is_in_the_guide(module: ModuleType):
    """With the same fields in its docstring and in the type; 28 and 19 fields are what Dynamo 1.6.1 serializes."""
    text = page("requests.md")
    for name, kind in vars(module).items():
        if not name.startswith("_") and typing.is_typeddict(kind):
            documented = re.findall(r":param (\w+):", kind.__doc__)
            assert sorted(documented) == sorted(kind.__annotations__)
            table = text.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
            assert [f"| `{field}` |" in table for field in documented] == [True] * len(documented)
    assert len(requests.Request.__annotations__) == 28
    assert len(responses.Chunk.__annotations__) == 19


def test_every_capability_of_an_engine_is_in_the_guide():
    text = page("plugins.md")
    for name in ("Engine", "RequestContext", "EngineInfo", "EndpointSpec", "EngineContext"):
        assert f"### `{name}`" in text
    for name, kind in vars(engine).items():
        if getattr(kind, "_is_runtime_protocol", False):
            assert f"### `{name}`" in text


def test_every_exit_code_is_in_the_manual():
    text = page("operations.md")
    for code in ExitCode:
        assert f"| `{code.value}` | `{code.name}` | " in text


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_setting_is_in_the_reference(option):
    text = page("settings.md")
    for name in (*option.flags, option.env, option.name):
        assert f"`{name}`" in text
    assert option.help.replace("|", "\\|") in text


def log_messages() -> set[str]:
    """Return the constant messages of all log calls above the level of debugging."""
    found = set()
    for path in Path(dynamo_worker.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args or isinstance(node.func, ast.Name):
                continue
            methods = [part for part in ast.walk(node.func) if isinstance(part, ast.Attribute)]
            if any(m.attr in LEVELS and re.search(r"\b_?log$", ast.unparse(m.value)) for m in methods):
                found |= {
                    part.value
                    for part in ast.walk(node.args[0])
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                }
    return found


def test_every_log_message_is_in_the_manual():
    messages = log_messages()
    assert {"Received shutdown signal", "Worker stopped", "Fatal error"} <= messages
    text = page("operations.md")
    missing = sorted(message for message in messages if message not in text)
    assert not missing, f"docs/operations.md does not explain: {missing}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_each_promise_has_tests():
    """The commands of the table of promises select tests."""
    table = page("testing.md").partition("### How each promise is tested")[2].partition("###")[0]
    commands = re.findall(r"`pytest ([^`]+)`", table)
    assert len(commands) > 8
    for command in commands:
        paths, _, expression = command.partition(" -k ")
        files = [ROOT / path for path in paths.split()]
        assert all(path.exists() for path in files), command
        sources = [source for path in files for source in (path.rglob("*.py") if path.is_dir() else [path])]
        sources += sorted(Path(dynamo_worker.__file__).parent.joinpath("testing").rglob("*.py"))
        names = re.findall(r"def (test_\w+)", "".join(source.read_text(encoding="utf-8") for source in sources))
        for word in re.findall(r"\w+", expression):
            assert word == "or" or any(word in name for name in names), f"pytest {command}: no test has {word!r}"
