"""Checks of text engines: the chunks of OpenAI's APIs, and what the frontend leaves to the engine."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from dynamo_worker.host.requests.text_kind import FINISH_REASONS, wrong_chunk
from dynamo_worker.testing.dialects import Text, only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_worker.testing.trial import Answer, Trial

#: Fields of OpenAI's APIs, and a value of the wrong type for each.
_WRONG_TYPES = [
    *((name, "hot") for name in ("temperature", "top_p", "seed", "n", "presence_penalty", "frequency_penalty")),
    *((name, "many") for name in ("max_tokens", "max_completion_tokens", "top_logprobs")),
    *((name, 7) for name in ("stop", "tools", "tool_choice", "response_format", "stream_options", "logit_bias")),
]
#: Options that leave a trace in the answer.
_TRACES: list[tuple[str, Any]] = [
    ("n", 2),
    ("logprobs", None),
    ("response_format", {"type": "json_object"}),
]


def _prompt_field(trial: Trial) -> str:
    canary = trial.canary()
    return next(name for name in FINISH_REASONS if canary.get(name) is not None)


def _texts(answer: Answer) -> list[str]:
    return Text().texts(answer.chunks)


def _ask(trial: Trial, tokens: int, fields: Mapping[str, Any]) -> Answer:
    return trial.run(trial.ask({**trial.request(tokens, prompt=1), **fields}), where=trial.engine.generate)


@only("text")
class TextChecks:
    """What a text engine sends, and what it must do by itself."""

    def test_chunks_have_the_form_of_the_api(self, trial: Trial) -> None:
        """The frontend answers HTTP 500, and says nowhere why, if a chunk lacks a field."""
        for chunk in trial.plain().chunks:
            wrong = wrong_chunk(chunk, _prompt_field(trial))
            trial.expect(wrong is None, f"the answer {wrong}: {chunk!r:.200}", trial.engine.generate)

    def test_all_chunks_of_an_answer_have_one_id(self, trial: Trial) -> None:
        """Clients tell answers apart by ``id``."""
        ids = {chunk.get("id") for chunk in trial.plain().chunks if isinstance(chunk, dict)}
        trial.expect(len(ids) == 1, f"the chunks have the ids {sorted(map(str, ids))}", trial.engine.generate)

    def test_answers_have_different_ids(self, trial: Trial) -> None:
        """Logs and traces of clients find an answer by its ``id``."""
        first, second = (trial.answer(2).chunks[0].get("id") for _ in range(2))
        trial.expect(first != second, f"two answers have the id {first!r}", trial.engine.generate)

    def test_chunks_name_the_model_that_was_asked_for(self, trial: Trial) -> None:
        """A client of several models, or of an alias, compares it with what it asked for."""
        wanted = trial.plain().request["model"]
        for chunk in trial.plain().chunks:
            got = chunk.get("model")
            trial.expect(got == wanted, f"model is {got!r} instead of {wanted!r}", trial.engine.generate)

    def test_chunks_have_new_text_only(self, trial: Trial) -> None:
        """The frontend joins chunks: one that repeats earlier text shows the client its text twice."""
        texts = _texts(trial.plain())
        pairs = list(itertools.pairwise(texts))
        repeats = len(pairs) > 2 and all(len(after) > len(first) and after.startswith(first) for first, after in pairs)
        trial.expect(not repeats, f"each chunk has the text of the one before, too: {texts[:4]}", trial.engine.generate)

    def test_a_stream_says_the_same(self, trial: Trial) -> None:
        """Whether a client wants a stream changes nothing but the form in which the frontend answers."""
        streamed = _ask(trial, 12, {"stream": True})
        plain = trial.plain().content()
        trial.expect(
            streamed.content() == plain, f"with stream {streamed.content()!r}, without {plain!r}", trial.engine.generate
        )

    def test_an_answer_without_a_stream_is_counted(self, trial: Trial) -> None:
        """Clients are billed by ``usage``, and for text engines nobody else counts."""
        trial.expect(trial.plain().usage, "no chunk has a usage, although `stream` is false", trial.engine.generate)

    def test_a_stream_is_counted_if_the_client_asks(self, trial: Trial) -> None:
        """``stream_options.include_usage`` is a promise of the API."""
        answer = _ask(trial, 3, {"stream": True, "stream_options": {"include_usage": True}})
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        last = answer.chunks[-1]
        trial.expect(last.get("usage"), f"the last chunk has no usage: {last!r:.200}", trial.engine.generate)

    def test_a_stream_is_not_counted_unasked(self, trial: Trial) -> None:
        """Many clients read ``choices[0]`` of every chunk, and break at one without choices."""
        for chunk in _ask(trial, 3, {"stream": True}).chunks:
            trial.expect(chunk.get("choices"), f"a chunk has no choices: {chunk!r:.200}", trial.engine.generate)

    @pytest.mark.parametrize("form", ["text", "list"])
    def test_a_stop_string_ends_the_answer(self, trial: Trial, form: str) -> None:
        """The frontend does not stop at them for a text engine: what is ignored reaches the client."""
        plain = trial.plain().content()
        string = plain[len(plain) // 2 :][:2]
        if len(string) < 2:
            trial.skip("the plain answer is too short")
        answer = _ask(trial, 12, {"stop": [string] if form == "list" else string})
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        expected = plain[: plain.index(string)]
        trial.expect(
            answer.content() == expected,
            f"with the stop string {string!r}: {answer.content()!r} instead of {expected!r}",
            trial.engine.generate,
        )
        trial.expect(answer.reasons == ["stop"], f"it ended with {answer.reasons}", trial.engine.generate)

    def test_a_stop_string_does_not_stay(self, trial: Trial) -> None:
        """A stop string of one request must not cut the next answer."""
        plain = trial.plain().content()
        _ask(trial, 12, {"stop": plain[:2]})
        again = trial.answer(12).content()
        trial.expect(again == plain, f"the next answer is {again!r} instead of {plain!r}", trial.engine.generate)

    @pytest.mark.parametrize(("name", "value"), _WRONG_TYPES, ids=[name for name, _ in _WRONG_TYPES])
    def test_a_wrong_type_of_a_field_is_no_crash(self, trial: Trial, name: str, value: Any) -> None:
        """A client's mistake that raises anything but InvalidRequestError is HTTP 500 and a page for the operator."""

        async def check() -> Answer:
            request_id = trial.name()
            request = {**trial.request(3, prompt=1), name: value}
            answer = await trial.ask(request, request_id, most=20)
            await trial.engine.abort(request_id)
            return answer

        answer = trial.run(check())
        trial.expect(answer.refusal is not None or answer.chunks, "neither answer nor refusal", trial.engine.generate)
        trial.expect(trial.answer(1).reasons, "the next request got no answer", trial.engine.generate)

    def test_an_unknown_field_of_the_body_is_refused_by_name(self, trial: Trial) -> None:
        """A client cannot tell that it did not get what it asked for, if the engine ignores the field."""
        answer = _ask(trial, 3, {"no_such_option": 1})
        trial.expect(answer.refusal is not None, "no_such_option was ignored, not refused", trial.engine.generate)
        named = "no_such_option" in str(answer.refusal)
        trial.expect(named, f"the refusal does not name it: {answer.refusal}", trial.engine.generate)

    @pytest.mark.parametrize(("name", "value"), _TRACES, ids=[name for name, _ in _TRACES])
    def test_a_field_of_the_body_is_honoured_or_refused(self, trial: Trial, name: str, value: Any) -> None:
        """An option that is ignored gives the client an answer to a question it did not ask."""
        if name == "logprobs":
            value = True if _prompt_field(trial) == "messages" else 1
        answer = _ask(trial, 12, {name: value})
        if answer.refusal is not None:
            return
        if name == "n":
            indexes = {choice["index"] for chunk in answer.chunks for choice in chunk["choices"]}
            trial.expect(indexes == {0, 1}, f"n = 2 gave the answers {indexes}", trial.engine.generate)
        elif name == "logprobs":
            found = [choice.get("logprobs") for chunk in answer.chunks for choice in chunk["choices"]]
            trial.expect(any(found), "logprobs was neither honoured nor refused", trial.engine.generate)
        else:
            changed = answer.content() != trial.plain().content()
            trial.expect(changed, f"{name} = {value!r} changed nothing in the answer", trial.engine.generate)

    def test_max_completion_tokens_is_kept(self, trial: Trial) -> None:
        """Newer chat clients send it in the place of ``max_tokens``."""
        if _prompt_field(trial) != "messages":
            trial.skip("the engine serves no chats")
        request = {name: value for name, value in trial.request(9, prompt=1).items() if name != "max_tokens"}
        answer = trial.run(trial.ask({**request, "max_completion_tokens": 4}), where=trial.engine.generate)
        if answer.refusal is not None:
            trial.skip(f"refused: {answer.refusal}")
        trial.expect(answer.made == 4, f"max_completion_tokens is 4; {answer.made} tokens came", trial.engine.generate)

    @pytest.mark.parametrize("api", ["chat", "completions"])
    def test_every_api_is_served(self, trial: Trial, api: str) -> None:
        """``EngineInfo.endpoint_types`` promises them to clients."""
        assert trial.info is not None
        if api not in trial.info.endpoint_types:
            trial.skip(f"the engine does not serve {api}")
        prompt = {"messages": [{"role": "user", "content": "abc"}]} if api == "chat" else {"prompt": "abc"}
        request = {"model": trial.request(1)["model"], "max_tokens": 3, **prompt}
        answer = trial.run(trial.ask(request), where=trial.engine.generate)
        trial.expect(answer.refusal is None, f"refused: {answer.refusal}", trial.engine.generate)
        for chunk in answer.chunks:
            wrong = wrong_chunk(chunk, next(iter(prompt)))
            trial.expect(wrong is None, f"the answer {wrong}: {chunk!r:.200}", trial.engine.generate)

    def test_a_conversation_is_served(self, trial: Trial) -> None:
        """Chats have more than one message, and messages of other roles than the user's."""
        if _prompt_field(trial) != "messages":
            trial.skip("the engine serves no chats")
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": f"{role} says abc"} for role in roles]
        answer = _ask(trial, 3, {"messages": messages})
        trial.expect(answer.refusal is None and answer.content(), f"refused: {answer.refusal}", trial.engine.generate)

    def test_parts_of_a_message_are_read_or_refused(self, trial: Trial) -> None:
        """Clients send a text as a list of one part, and images beside it."""
        if _prompt_field(trial) != "messages":
            trial.skip("the engine serves no chats")
        text = {"type": "text", "text": "abc"}
        answer = _ask(trial, 3, {"messages": [{"role": "user", "content": [text]}]})
        trial.expect(answer.refusal is not None or answer.content(), "no answer", trial.engine.generate)
        for content in (None, [], [{"type": "no-such-type"}], [7], 7):
            bad = _ask(trial, 3, {"messages": [{"role": "user", "content": content}]})
            trial.expect(bad.refusal is not None or bad.chunks, f"{content!r}: no answer", trial.engine.generate)

    def test_an_id_is_no_part_of_the_body(self, trial: Trial) -> None:
        """Two clients with the same body at once are two requests."""

        async def check() -> list[Answer]:
            request = trial.request(12, prompt=1)
            return await asyncio.gather(*(trial.ask(dict(request)) for _ in range(3)))

        answers = [answer.content() for answer in trial.run(check(), where=trial.engine.generate)]
        trial.expect(len(set(answers)) == 1, f"the same request three times: {answers}", trial.engine.generate)
