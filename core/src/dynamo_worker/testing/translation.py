"""What every engine's translation of requests has to keep: each field is passed on, left to the frontend, or refused.

A plugin's tests derive from :class:`Translation` and write down what becomes of those fields that have another name in
the engine than in Dynamo::

    class TestTranslation(Translation):
        TABLE = sampling.TABLE
        PASSED_ON = {**Translation.PASSED_ON, ("sampling_options", "seed"): (42, "random_seed", 42)}
        GUIDES = {"regex": ("a+", {"pattern": "a+"}), ...}

        def translate(self, request, defaults):
            return SamplingTable(defaults, self.CONTEXT_LENGTH).translate(request)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit import guided_decoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.kit.translation import RequestTable

#: What Dynamo 1.6.1 sends.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "sampling_options": (
        *("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p"),
        *("top_k", "min_p", "seed", "use_beam_search", "length_penalty", "include_stop_str_in_output"),
        "guided_decoding",
    ),
    "stop_conditions": (
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden"),
        *("ignore_eos", "max_thinking_tokens"),
    ),
    "output_options": (
        *("logprobs", "prompt_logprobs", "skip_special_tokens", "formatted_prompt", "return_tokens_as_token_ids"),
        "no_stop_trim",
    ),
}
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def _section(name: str) -> st.SearchStrategy[Any]:
    names = st.sampled_from(FIELDS[name]) | st.text(max_size=8)
    return st.dictionaries(names, _json, max_size=5) | _json


_ANYTHING = st.fixed_dictionaries(
    {"token_ids": st.lists(st.integers(0, 500), min_size=1, max_size=105)},
    optional={
        **{name: _section(name) for name in FIELDS},
        **dict.fromkeys(("extra_args", "routing", "nvext", "agent_context", "kv_hint"), _json),
    },
)
_IN_RANGE = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 2),
        "temperature": st.floats(0.1, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(1, 1000),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**63 - 1),
        "n": st.integers(1, 16),
    },
)


class Translation(ABC):
    """The tests. The model they are about has a context of 100 tokens."""

    CONTEXT_LENGTH = 100
    #: What the engine makes of each field.
    TABLE: ClassVar[RequestTable]
    #: For every field that is passed on a value, the engine's name of it, and what the value becomes; here for an
    #: engine that has all of Dynamo's names.
    PASSED_ON: ClassVar[Mapping[tuple[str, str], tuple[Any, str, Any]]] = {
        ("sampling_options", "n"): (2, "n", 2),
        ("sampling_options", "presence_penalty"): (0.5, "presence_penalty", 0.5),
        ("sampling_options", "frequency_penalty"): (-0.5, "frequency_penalty", -0.5),
        ("sampling_options", "repetition_penalty"): (1.25, "repetition_penalty", 1.25),
        ("sampling_options", "temperature"): (0.5, "temperature", 0.5),
        ("sampling_options", "top_p"): (0.5, "top_p", 0.5),
        ("sampling_options", "top_k"): (7, "top_k", 7),
        ("sampling_options", "min_p"): (0.25, "min_p", 0.25),
        ("sampling_options", "seed"): (42, "seed", 42),
        ("stop_conditions", "max_tokens"): (9, "max_tokens", 9),
        ("stop_conditions", "min_tokens"): (4, "min_tokens", 4),
        ("stop_conditions", "stop_token_ids"): ([3, 4], "stop_token_ids", [3, 4]),
        ("stop_conditions", "stop_token_ids_visible"): ([3, 4], "stop_token_ids", [3, 4]),
        ("stop_conditions", "stop_token_ids_hidden"): ([3, 4], "stop_token_ids", [3, 4]),
        ("stop_conditions", "ignore_eos"): (True, "ignore_eos", True),
        ("stop_conditions", "max_thinking_tokens"): (11, "max_thinking_tokens", 11),
        ("output_options", "logprobs"): (3, "logprobs", 3),
        ("output_options", "prompt_logprobs"): (2, "prompt_logprobs", 2),
    }
    #: Fields that the frontend takes care of, with a value.
    LEFT_TO_THE_FRONTEND: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("sampling_options", "include_stop_str_in_output"): True,
        ("stop_conditions", "stop"): ["END"],
        ("output_options", "skip_special_tokens"): False,
        ("output_options", "formatted_prompt"): True,
        ("output_options", "return_tokens_as_token_ids"): True,
        ("output_options", "no_stop_trim"): True,
    }
    #: Fields that the engine has nothing for, with a value that asks for something and one that does not.
    REFUSED: ClassVar[Mapping[tuple[str, str], tuple[Any, Any]]] = {
        ("sampling_options", "best_of"): (4, 1),
        ("sampling_options", "use_beam_search"): (True, False),
        ("sampling_options", "length_penalty"): (2.0, 1.0),
    }
    #: Wrong constraints on the text, by what is wrong with them.
    WRONG_GUIDES: ClassVar[Mapping[str, Any]] = {
        "two at once": {"regex": "a", "json": {}},
        "a backend": {"json": {}, "backend": "outlines"},
        "in a circle": {"json": {"$ref": "#"}},
        "no object": 3,
        "no choice": {"choice": []},
        "unknown": {"new": 1},
    }
    #: What no engine has to cope with: more than the limits of ``request_limits.py``.
    TOO_LARGE: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("sampling_options", "n"): 129,
        ("stop_conditions", "stop_token_ids"): [1] * 1025,
        ("output_options", "prompt_logprobs"): 50_000,
    }
    #: The same for constraints on the text.
    LARGE_GUIDES: ClassVar[Mapping[str, Any]] = {
        "regex": "a" * 8193,
        "grammar": f'root ::= "{"a" * 65_536}"',
        "choice": ["a"] * 10_001,
        "json": {"enum": ["a"] * 16_384},
        "structural_tag": {"format": {"type": "const_string", "value": "a" * 262_144}},
    }
    #: A constraint of every kind, and what ``value_of(…, "guided_decoding")`` returns for it.
    GUIDES: ClassVar[Mapping[str, tuple[Any, Any]]]

    @abstractmethod
    def translate(self, request: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
        """Return the request in the engine's terms; None if it asks for nothing.

        :param defaults: what the model's own generation configuration says, by the engine's names.
        """

    @abstractmethod
    def value_of(self, translated: Any, name: str) -> Any:
        """Return the value of one of the engine's parameters, lists sorted."""

    @abstractmethod
    def check(self, translated: Any) -> None:
        """Raise anything if what was translated breaks the engine's own rules."""

    def translated(self, defaults: Mapping[str, Any] | None = None, /, **sections: Any) -> Any:
        """Translate a good request with these sections, for a model that has no defaults unless they are given."""
        translated = self.translate({"model": "tiny", "token_ids": [5, 6, 7], **sections}, defaults or {})
        assert translated is not None
        return translated

    def name_of(self, section: str, name: str) -> str:
        """Return the engine's name of a field."""
        return self.PASSED_ON[section, name][1]

    def test_every_field_of_dynamo_is_in_the_table(self) -> None:
        fields = (self.TABLE.sampling, self.TABLE.stop, self.TABLE.output)
        for (section, names), known in zip(FIELDS.items(), fields, strict=True):
            assert set(known) == set(names)
            tested = {
                name for where, name in (*self.PASSED_ON, *self.LEFT_TO_THE_FRONTEND, *self.REFUSED) if where == section
            }
            assert tested | {"guided_decoding"} >= set(names)
        assert set(self.GUIDES) == set(guided_decoding.KEYS) - {"whitespace_pattern"}

    def test_what_is_passed_on(self) -> None:
        for (section, name), (value, target, expected) in self.PASSED_ON.items():
            assert self.value_of(self.translated(**{section: {name: value}}), target) == expected, name
            default = self.value_of(self.translated(), target)
            assert self.value_of(self.translated(**{section: {name: None}}), target) == default, name

    def test_what_is_left_to_the_frontend(self) -> None:
        for (section, name), value in self.LEFT_TO_THE_FRONTEND.items():
            assert self.translated(**{section: {name: value}}) == self.translated(), name

    def test_what_is_refused(self) -> None:
        for (section, name), (value, harmless) in self.REFUSED.items():
            with pytest.raises(InvalidRequestError, match=f"{section}.{name}"):
                self.translated(**{section: {name: value}})
            assert self.translated(**{section: {name: harmless}}) == self.translated()

    @pytest.mark.parametrize("section", FIELDS)
    def test_an_unknown_field(self, section: str) -> None:
        with pytest.raises(InvalidRequestError, match=f"{section}.new is not supported"):
            self.translated(**{section: {"new": 1}})

    @pytest.mark.parametrize("section", [*FIELDS, "extra_args"])
    def test_a_section_that_is_no_object(self, section: str) -> None:
        with pytest.raises(InvalidRequestError, match=f"{section}: expected an object"):
            self.translated(**{section: [1]})

    @pytest.mark.parametrize("name", ["prompt_embeds", "mm_processor_kwargs", "encoder_result", "something_new"])
    def test_what_a_text_model_cannot_do(self, name: str) -> None:
        with pytest.raises(InvalidRequestError, match=name):
            self.translated(**{name: {"image": "x"}})
        assert self.translated(**{name: None}) == self.translated()

    def test_no_tokens_at_all(self) -> None:
        # After a migration nothing may be left to generate.
        assert self.translate({"token_ids": [5], "stop_conditions": {"max_tokens": 0}}, {}) is None

    @pytest.mark.parametrize("limit", [None, 1000])
    def test_the_answer_fits_into_the_context(self, limit: int | None) -> None:
        translated = self.translated(stop_conditions={"max_tokens": limit})
        fits = self.value_of(translated, self.name_of("stop_conditions", "max_tokens"))
        assert fits == self.CONTEXT_LENGTH - 3

    def test_the_models_defaults_and_what_overrides_them(self) -> None:
        temperature, top_k = (self.name_of("sampling_options", name) for name in ("temperature", "top_k"))
        defaults = {temperature: 0.6, top_k: 20}
        translated = self.translated(defaults, sampling_options={"temperature": 0.2, "top_k": None})
        assert (self.value_of(translated, temperature), self.value_of(translated, top_k)) == (0.2, 20)

    def test_all_stop_tokens_together(self) -> None:
        conditions = {"stop_token_ids": [3], "stop_token_ids_visible": [4], "stop_token_ids_hidden": [5]}
        translated = self.translated(stop_conditions=conditions)
        assert self.value_of(translated, self.name_of("stop_conditions", "stop_token_ids")) == [3, 4, 5]

    @pytest.mark.parametrize("tokens", [CONTEXT_LENGTH, CONTEXT_LENGTH + 1, 10 * CONTEXT_LENGTH])
    def test_a_prompt_that_is_too_long(self, tokens: int) -> None:
        with pytest.raises(InvalidRequestError, match=f"{tokens} tokens.*context length is {self.CONTEXT_LENGTH}"):
            self.translate({"token_ids": [5] * tokens}, {})

    @pytest.mark.parametrize("kind", sorted(set(guided_decoding.KEYS) - {"whitespace_pattern"}))
    def test_guided_decoding(self, kind: str) -> None:
        value, expected = self.GUIDES[kind]
        translated = self.translated(sampling_options={"guided_decoding": {kind: value, "backend": None}})
        assert self.value_of(translated, "guided_decoding") == expected

    def test_guided_decoding_of_nothing(self) -> None:
        nothing: dict[str, Any] = dict.fromkeys(guided_decoding.KEYS)
        assert self.translated(sampling_options={"guided_decoding": nothing}) == self.translated()

    def test_wrong_guides(self) -> None:
        for guide in self.WRONG_GUIDES.values():
            with pytest.raises(InvalidRequestError, match="guided_decoding"):
                self.translated(sampling_options={"guided_decoding": guide})

    def test_what_is_too_large(self) -> None:
        for (section, name), value in self.TOO_LARGE.items():
            with pytest.raises(InvalidRequestError, match=f"{section}.{name}: .* at most"):
                self.translated(**{section: {name: value}})
        for kind, guide in self.LARGE_GUIDES.items():
            with pytest.raises(InvalidRequestError, match=f"guided_decoding.{kind}: .* at most"):
                self.translated(sampling_options={"guided_decoding": {kind: guide}})

    def test_a_schema_that_nests_itself(self) -> None:
        tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
        assert self.translated(sampling_options={"guided_decoding": {"json": tree}}) != self.translated()

    @given(request=_ANYTHING)
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    def test_any_request_is_translated_or_refused(self, request: dict[str, Any]) -> None:
        try:
            translated = self.translate(request, {})
        except InvalidRequestError:
            return
        if translated is not None:
            self.check(translated)

    @given(options=_IN_RANGE)
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    def test_what_is_in_range_arrives_unchanged(self, options: dict[str, Any]) -> None:
        translated = self.translated(sampling_options=options)
        for name, value in options.items():
            found = self.value_of(translated, self.name_of("sampling_options", name))
            assert found == pytest.approx(value), name
