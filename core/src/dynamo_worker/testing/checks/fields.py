"""Checks of a request's fields: each one is honoured or refused by name, and a wrong value harms nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Answer, Trial

#: The fields that concern every engine, and a value of the wrong type for each.
_WRONG_TYPES = [
    *(("sampling_options", name, "hot") for name in ("temperature", "top_p", "top_k", "min_p", "seed", "n")),
    *(("sampling_options", name, []) for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")),
    *(("stop_conditions", name, "many") for name in ("max_tokens", "min_tokens", "ignore_eos")),
    *(("stop_conditions", name, 7) for name in ("stop_token_ids", "stop_token_ids_hidden")),
    *(("output_options", name, {}) for name in ("logprobs", "prompt_logprobs")),
]
#: Options that no engine honours without a trace in the answer.
_ENGINES_OWN = [
    ("sampling_options", "n", 2),
    ("sampling_options", "use_beam_search", True),
    ("sampling_options", "guided_decoding", {"choice": ["yes", "no"]}),
    ("sampling_options", "guided_decoding", {"regex": "[0-9]{2}"}),
    ("sampling_options", "guided_decoding", {"json": {"type": "object"}}),
]


def _id(value: object) -> str:
    return "+".join(value) if isinstance(value, dict) else value if isinstance(value, str) else "-"


def _survived(trial: Trial, request: Any, sections: dict[str, dict[str, Any]]) -> None:
    """Send a request with wrong values, and expect a refusal or an answer, and a sound engine afterwards."""
    for section, values in sections.items():
        request[section] = {**(request.get(section) or {}), **values}

    async def check() -> Answer:
        name = trial.name()
        answer = await trial.ask(request, name, most=20)
        await trial.engine.abort(name)
        return answer

    answer = trial.run(check())
    trial.expect(answer.refusal is not None or answer.chunks, "neither answer nor refusal", trial.engine.generate)
    trial.expect(trial.answer(1).reasons, "the next request got no answer", trial.engine.generate)


class FieldChecks:
    """Every field of a request."""

    @only("tokens")
    @pytest.mark.parametrize(("section", "name", "value"), _WRONG_TYPES, ids=_id)
    def test_a_wrong_type_is_no_crash(self, trial: Trial, section: str, name: str, value: Any) -> None:
        """A client's mistake that raises anything but InvalidRequestError is HTTP 500 and a page for the operator."""
        _survived(trial, trial.request(3, prompt=1), {section: {name: value}})

    @only("tokens")
    @pytest.mark.parametrize("section", ["sampling_options", "stop_conditions", "output_options", "extra_args"])
    def test_a_section_of_a_wrong_type_is_no_crash(self, trial: Trial, section: str) -> None:
        """Any client that reaches the endpoint can send it."""
        request: dict[str, Any] = {**trial.request(3, prompt=1), section: "nonsense"}
        if section == "stop_conditions":
            answer = trial.run(trial.ask(request, most=3))
            trial.expect(answer.refusal or answer.chunks, "no answer", trial.engine.generate)
            return
        _survived(trial, request, {})

    @only("tokens")
    @pytest.mark.parametrize("section", ["sampling_options", "stop_conditions", "output_options"])
    def test_a_missing_section_is_no_crash(self, trial: Trial, section: str) -> None:
        """Frontends leave empty sections out, or send null."""
        request: dict[str, Any] = {**trial.request(3, prompt=1), section: None}

        async def check() -> Answer:
            name = trial.name()
            answer = await trial.ask(request, name, most=3)
            await trial.engine.abort(name)
            return answer

        answer = trial.run(check())
        trial.expect(answer.chunks, f"no answer: {answer.refusal}", trial.engine.generate)

    @only("tokens")
    @pytest.mark.parametrize("section", ["sampling_options", "stop_conditions", "output_options"])
    def test_an_unknown_field_is_refused_by_name(self, trial: Trial, section: str) -> None:
        """A client cannot tell that it did not get what it asked for, if the engine ignores the field."""
        answer = trial.answer(3, **{section: {"no_such_option": 1}})  # type: ignore[arg-type]
        trial.expect(
            answer.refusal is not None, f"{section}.no_such_option was ignored, not refused", trial.engine.generate
        )
        trial.expect(
            "no_such_option" in str(answer.refusal),
            f"the refusal does not name it: {answer.refusal}",
            trial.engine.generate,
        )

    @only("tokens")
    def test_an_unknown_extra_option_is_refused_by_name(self, trial: Trial) -> None:
        """``extra_args.sampling_options`` has what clients ask for beyond Dynamo's fields."""
        answer = trial.answer(3, extra_args={"sampling_options": {"no_such_option": 1}})
        trial.expect(
            "no_such_option" in str(answer.refusal),
            f"extra_args.sampling_options.no_such_option was not refused by name: {answer.refusal}",
            trial.engine.generate,
        )

    @only("tokens")
    @pytest.mark.parametrize(("section", "name", "value"), _ENGINES_OWN, ids=_id)
    def test_an_option_is_honoured_or_refused(self, trial: Trial, section: str, name: str, value: Any) -> None:
        """An option that is ignored gives the client an answer to a question it did not ask."""
        answer = trial.answer(12, **{section: {name: value}})  # type: ignore[arg-type]
        if answer.refusal is not None:
            return
        if name == "n":
            indexes = {chunk.get("index") for chunk in answer.chunks}
            trial.expect(indexes == {0, 1}, f"n = 2 gave the answers {indexes}", trial.engine.generate)
            trial.expect(len(answer.reasons) == 2, f"two answers ended with {answer.reasons}", trial.engine.generate)
        else:
            changed = answer.content() != trial.plain().content()
            trial.expect(changed, f"{section}.{name} = {value!r} changed nothing in the answer", trial.engine.generate)

    @only("tokens", "text")
    @pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
    def test_the_sharpest_sampling_is_greedy(self, trial: Trial, name: str) -> None:
        """A sampling option that is read wrongly gives every client other answers than it asked for."""
        sharpest: dict[str, Any] = {
            "temperature": {"temperature": 0.0},
            "top_k": {"temperature": 1.0, "top_k": 1},
            "top_p": {"temperature": 1.0, "top_p": 1e-6},
            "min_p": {"temperature": 1.0, "min_p": 1.0},
        }[name]
        answer = trial.answer(5, sampling_options=sharpest)
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        plain = trial.plain().content()[: len(answer.content())]
        trial.expect(answer.content() == plain, f"{sharpest} gave {answer.content()} instead of {plain}")

    @only("tokens", "text")
    def test_a_seed_makes_sampling_repeatable(self, trial: Trial) -> None:
        """Clients use seeds to get the same answer again."""
        sampling = {"temperature": 1.0, "seed": 7}
        first = trial.answer(5, sampling_options=sampling)
        if first.refusal is not None:
            trial.skip(f"refused: {first.refusal}")
        again = trial.answer(5, sampling_options=sampling)
        trial.expect(first.content() == again.content(), f"{first.content()} and {again.content()} with the same seed")

    @only("tokens")
    def test_the_frontends_own_fields_are_accepted(self, trial: Trial) -> None:
        """The frontend sends them with every request: an engine that refuses them serves nobody."""
        answer = trial.answer(
            2,
            sampling_options={"n": 1, "temperature": 0.5},
            stop_conditions={"stop_token_ids_hidden": [1], "max_tokens": 2},
            output_options={"skip_special_tokens": True},
        )
        trial.expect(answer.refusal is None, f"refused: {answer.refusal}", trial.engine.generate)
