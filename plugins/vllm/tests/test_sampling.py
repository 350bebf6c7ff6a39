"""The translation table: every field of a Dynamo request is passed on, left to the frontend, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from dynamo_worker import InvalidRequestError
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
