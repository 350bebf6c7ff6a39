"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import json_schema
from dynamo_worker.testing.translation import Translation
from dynamo_worker_vllm import sampling
from dynamo_worker_vllm.sampling import SamplingTable


class TestTranslation(Translation):
    TABLE: ClassVar = sampling.TABLE
    PASSED_ON: ClassVar = {
        **Translation.PASSED_ON,
        ("stop_conditions", "max_thinking_tokens"): (11, "thinking_token_budget", 11),
    }
    GUIDES: ClassVar = {
        "json": ({"type": "object"}, {"json": {"type": "object"}}),
        "regex": ("a+", {"regex": "a+"}),
        "choice": (["yes", "no"], {"choice": ["yes", "no"]}),
        "grammar": ('root ::= "a"', {"grammar": 'root ::= "a"'}),
        "structural_tag": ({"type": "structural_tag"}, {"structural_tag": '{"type": "structural_tag"}'}),
    }

    def translate(self, request: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
        sampling.kv_hints(request)
        sampling.reasoning(request)
        return SamplingTable(defaults, self.CONTEXT_LENGTH).translate(request)

    def value_of(self, translated: Any, name: str) -> Any:
        if name == "guided_decoding":
            return {kind: value for kind in self.GUIDES if (value := getattr(translated.structured_outputs, kind))}
        value = getattr(translated, name)
        return sorted(value) if isinstance(value, list) else value

    def check(self, translated: Any) -> None:
        translated.__post_init__()

    def test_only_deltas_and_no_text(self) -> None:
        params = self.translated()
        assert params.detokenize is False
        assert params.output_kind.name == "DELTA"

    def test_a_limit_of_the_models_own(self) -> None:
        assert self.translated({"max_tokens": 30}).max_tokens == 30

    def test_the_whole_vocabulary(self) -> None:
        assert self.translated(output_options={"logprobs": 2**32 - 1}).logprobs == -1

    @pytest.mark.parametrize("all_of_them", [-1, 0])
    def test_no_limit_to_the_likeliest_tokens(self, all_of_them: int) -> None:
        assert self.translated(sampling_options={"top_k": all_of_them}).top_k == all_of_them


def test_kv_hints() -> None:
    action = {"action_id": "1", "action_type": "pin", "action_version": "1", "payload": {"blocks": 2}}
    hints = sampling.kv_hints({"kv_hint": {"protocol_version": "1", "message_id": "m", "actions": [action]}})
    assert hints is not None
    assert hints.actions[0].payload == {"blocks": 2}
    assert sampling.kv_hints({}) is None
    with pytest.raises(InvalidRequestError, match="kv_hint"):
        sampling.kv_hints({"kv_hint": {"actions": 3}})


def test_kv_hints_are_bounded() -> None:
    with pytest.raises(InvalidRequestError, match=r"kv_hint: .* levels"):
        sampling.kv_hints({"kv_hint": functools.reduce(lambda inner, _: [inner], range(65), 1)})


@pytest.mark.parametrize("extra", [{}, {"reasoning_ended": True}, {"reasoning_parser_kwargs": None}])
def test_what_is_known_of_the_reasoning(extra: dict[str, Any]) -> None:
    expected = {"reasoning_ended": None, "reasoning_parser_kwargs": None, **extra}
    assert sampling.reasoning({"extra_args": extra}) == expected
    arguments = {"chat_template_kwargs": {"enable_thinking": False}}
    both = {**extra, "reasoning_parser_kwargs": arguments}
    assert sampling.reasoning({"extra_args": both})["reasoning_parser_kwargs"] == arguments


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_ended": 1},
        {"reasoning_ended": {}},
        {"reasoning_parser_kwargs": [1]},
        {"reasoning_parser_kwargs": {"tokenizer": None}},
        {"reasoning_parser_kwargs": {"chat_template_kwargs": [1]}},
        {"reasoning_parser_kwargs": {"chat_template_kwargs": {"a": "x" * 262_144}}},
    ],
)
def test_what_would_end_the_engine_core_never_gets_there(extra: dict[str, Any]) -> None:
    """It decodes a request by its types, and hands these on to the parser's constructor."""
    with pytest.raises(InvalidRequestError, match="reasoning_"):
        sampling.reasoning({"extra_args": extra})


def test_a_constraint_is_compiled_once_and_not_where_vllm_verifies_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def from_regex(pattern: str) -> None:
        compiled.append(threading.current_thread().name)
        if pattern == "(":
            raise RuntimeError("no closing parenthesis")

    monkeypatch.setattr("xgrammar.Grammar.from_regex", from_regex)
    model: Any = SimpleNamespace(is_diffusion=False, max_logprobs=20, get_vocab_size=lambda: 100)
    backend: Any = SimpleNamespace(backend="xgrammar")

    def params(pattern: str) -> Any:
        request = {"token_ids": [5], "sampling_options": {"guided_decoding": {"regex": pattern}}}
        return SamplingTable({}, 100).translate(request)

    good = params("a+")
    good.verify_guide(model, backend, object())
    assert len(compiled) == 1
    copy = good.clone()
    copy.verify(model, None, backend, object())
    assert len(compiled) == 1, "what was verified is not verified again"
    with pytest.raises(VLLMValidationError, match="parenthesis"):
        params("(").verify_guide(model, backend, object())
    with pytest.raises(VLLMValidationError, match="parenthesis"):
        params("(").verify(model, None, backend, object())
    logit_bias = {"sampling_options": {"guided_decoding": {"regex": "a"}, "logit_bias": {"100": 1}}}
    biased: Any = SamplingTable({}, 100).translate({"token_ids": [5], "extra_args": logit_bias})
    biased.verify_guide(model, backend, object())
    with pytest.raises(VLLMValidationError, match="vocab"):
        biased.verify(model, None, backend, object())


@pytest.mark.parametrize("backend", ["xgrammar", "auto", "guidance"])
@pytest.mark.parametrize(
    "guide",
    [
        {"json": {"type": "string", "format": []}},
        {"json": {"type": [[1]], "enum": 3}},
        {"structural_tag": {"structures": [{"begin": 1}]}},
        {"structural_tag": {"format": 3}},
        {"grammar": "("},
    ],
)
def test_a_constraint_with_parts_of_the_wrong_types_is_the_clients_fault(guide: dict[str, Any], backend: str) -> None:
    model: Any = SimpleNamespace(is_diffusion=False)
    request = {"token_ids": [5], "sampling_options": {"guided_decoding": guide}}
    params: Any = SamplingTable({}, 100).translate(request)
    try:
        params.verify_guide(model, SimpleNamespace(backend=backend), object())
    except (InvalidRequestError, VLLMValidationError, ValueError):
        return


def test_guided_parameters_are_the_same_to_the_engine_core() -> None:
    options = {"guided_decoding": {"regex": "a+"}, "temperature": 0.5, "n": 2}
    params = SamplingTable({}, 100).translate({"token_ids": [5], "sampling_options": options})
    assert type(params) is sampling.GuidedParams
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert {name: getattr(decoded, name) for name in SamplingParams.__struct_fields__} == {
        name: getattr(params, name) for name in SamplingParams.__struct_fields__
    }
    plain = SamplingTable({}, 100).translate({"token_ids": [5]})
    assert type(plain) is SamplingParams


#: Ways from one definition of a schema to the next.
STEPS: dict[str, Callable[[Any], Any]] = {
    "reference": lambda next_: next_,
    "property": lambda next_: {"type": "object", "properties": {"x": next_}, "required": ["x"]},
    "item": lambda next_: {"type": "array", "items": next_},
    "all of": lambda next_: {"allOf": [next_]},
    "any of": lambda next_: {"anyOf": [next_, {"type": "null"}]},
    "other property": lambda next_: {"type": "object", "additionalProperties": next_},
}

_COMPILE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from dynamo_worker_vllm.sampling import SamplingTable

settings = SimpleNamespace(backend="auto", disable_any_whitespace=False, disable_additional_properties=False)
with ThreadPoolExecutor(1) as pool:
    for schema in json.load(sys.stdin):
        request = {"token_ids": [1], "sampling_options": {"guided_decoding": {"json": schema}}}
        params = SamplingTable({}, 4096).translate(request)
        pool.submit(params.verify_guide, SimpleNamespace(is_diffusion=False), settings, object()).result()
        print(params.structured_outputs._backend)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("end", [{"type": "string"}, {"type": "number", "multipleOf": 3}], ids=["xgrammar", "guidance"])
def test_no_schema_that_is_accepted_ends_the_process(end: dict[str, Any]) -> None:
    """The compilers recurse on the stack of the worker's own process, which a long way through references ended."""
    schemas: list[dict[str, Any]] = [
        {"type": "string", "pattern": "(" * 4096 + ")" * 4096},
        {"patternProperties": {"(" * 4096 + "a" + ")" * 4095: {"type": "string"}}},
    ]
    if "multipleOf" in end:  # vLLM hands it to llguidance, which refuses the others
        schemas.clear()
    for step in STEPS.values():
        links = 1
        accepted: dict[str, Any] = {}
        while True:
            names = {f"d{number}": step({"$ref": f"#/$defs/d{number + 1}"}) for number in range(links)}
            schema = {"$ref": "#/$defs/d0", "$defs": {**names, f"d{links}": end}}
            try:
                json_schema.check_schema("schema", schema)
            except InvalidRequestError:
                break
            accepted, links = schema, links + 20
        schemas.append(accepted)
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=json.dumps(schemas),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {"guidance" if "multipleOf" in end else "xgrammar"}
