"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import guided_decoding
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.testing.translation import Translation
from dynamo_worker_transformers import sampling
from dynamo_worker_transformers.sampling import SamplingTable

VOCABULARY = 500


def table(defaults: Mapping[str, Any], *, shares: bool = False) -> SamplingTable:
    model = {"sampling": defaults, "context_length": Translation.CONTEXT_LENGTH, "vocab_size": VOCABULARY}
    return SamplingTable({**model, "end_ids": [2, 8], "prefix_sharing": shares})


class TestTranslation(Translation):
    TABLE: ClassVar = sampling.TABLE
    PASSED_ON: ClassVar = {
        field: entry
        for field, entry in Translation.PASSED_ON.items()
        if field not in {("stop_conditions", "max_thinking_tokens"), ("output_options", "prompt_logprobs")}
    } | {("stop_conditions", "ignore_eos"): (True, "ends", [])}
    REFUSED: ClassVar = {
        **Translation.REFUSED,
        ("stop_conditions", "max_thinking_tokens"): (11, None),
        ("output_options", "prompt_logprobs"): (2, None),
    }
    TOO_LARGE: ClassVar = {
        field: value for field, value in Translation.TOO_LARGE.items() if field != ("output_options", "prompt_logprobs")
    }
    GUIDES: ClassVar = {
        "json": ({"type": "object"}, None),
        "regex": ("a+", None),
        "choice": (["yes"], None),
        "grammar": ('root ::= "a"', None),
        "structural_tag": ({"format": {"type": "any_text"}}, None),
    }

    def translate(self, request: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
        return table(defaults).translate(request)

    def value_of(self, translated: Any, name: str) -> Any:
        value = getattr(translated, name, translated.sampling.get(name))
        return sorted(value) if isinstance(value, list) else value

    def check(self, translated: Any) -> None:
        json.dumps([translated.ends, translated.stop_token_ids, translated.sampling], allow_nan=False)
        assert 0 < translated.max_tokens < self.CONTEXT_LENGTH
        assert all(0 <= token < VOCABULARY for token in translated.ends)
        parameters = translated.sampling
        assert parameters.get("temperature", 1.0) == 0.0 or parameters.get("temperature", 1.0) >= 0.01
        assert parameters.get("top_k", 0) >= 0
        assert 0.0 <= parameters.get("top_p", 1.0) <= 1.0

    @pytest.mark.parametrize("kind", sorted(set(guided_decoding.KEYS) - {"whitespace_pattern"}))
    def test_guided_decoding(self, kind: str) -> None:
        """There is no grammar backend: constraints are refused by their names."""
        value, _ = self.GUIDES[kind]
        with pytest.raises(InvalidRequestError, match=rf"guided_decoding\.{kind} is not supported"):
            self.translated(sampling_options={"guided_decoding": {kind: value, "backend": None}})

    def test_a_schema_that_nests_itself(self) -> None:
        tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
        with pytest.raises(InvalidRequestError, match=r"guided_decoding\.json"):
            self.translated(sampling_options={"guided_decoding": {"json": tree}})


def translated(request: dict[str, Any] | None = None, /, **options: Any) -> Any:
    result = table({}, **options).translate({"token_ids": [5, 6, 7], **(request or {})})
    assert result is not None
    return result


def test_an_answer_ends_at_the_models_tokens_and_the_requests() -> None:
    params = translated({"stop_conditions": {"stop_token_ids": [3, 10**6]}})
    assert (params.ends, params.stop_token_ids) == ([2, 3, 8], [3])
    assert translated({"stop_conditions": {"stop_token_ids": [3], "ignore_eos": True}}).ends == [3]


@pytest.mark.parametrize(("given", "used"), [(0, 0.0), (1e-9, 0.01), (0.5, 0.5), (1e30, 1e30)])
def test_temperatures(given: float, used: float) -> None:
    assert translated({"sampling_options": {"temperature": given}}).sampling["temperature"] == used


def test_a_bias_is_for_tokens_of_the_model() -> None:
    assert translated({"extra_args": {"sampling_options": {"logit_bias": {"3": 5}}}}).sampling["logit_bias"] == {3: 5.0}
    for token in (VOCABULARY, -1):
        with pytest.raises(InvalidRequestError, match=f"no token {token}"):
            translated({"extra_args": {"sampling_options": {"logit_bias": {str(token): 5}}}})


def test_the_whole_vocabulary() -> None:
    with pytest.raises(InvalidRequestError, match=r"output_options\.logprobs: .* at most"):
        translated({"output_options": {"logprobs": 2**32 - 1}})


def test_a_cache_of_its_own() -> None:
    """Nobody's prefixes are kept apart, unless nobody shares any."""
    salted = {"routing": {"cache_salt": "tenant"}}
    assert translated(salted, shares=False)
    with pytest.raises(InvalidRequestError, match=r"cache_salt.*--no-prefix-sharing"):
        translated(salted, shares=True)


def test_a_canary() -> None:
    params = translated(dict(canary_request(None, None)))
    assert (params.max_tokens, params.ends, params.sampling) == (1, [], {"temperature": 0.0})
