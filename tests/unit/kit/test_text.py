"""Fields and chunks of a text engine's requests."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_worker.engine import LocalContext
from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.host.requests.text_kind import wrong_chunk
from dynamo_worker.kit.text import StopStrings, TextChunks, last_message, max_tokens, refuse_others, stop_strings

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}


@pytest.mark.parametrize("request_", [CHAT, COMPLETION])
def test_chunks_have_the_form_of_their_api(request_):
    chunks = TextChunks(request_, LocalContext("7"))
    made = [
        chunks.chunk("a"),
        chunks.chunk("b", index=1),
        chunks.chunk("c", finish_reason="stop"),
        chunks.usage(3, 2, 1),
    ]
    field = "messages" if request_ is CHAT else "prompt"
    assert [wrong_chunk(chunk, field) for chunk in made] == [None] * 4
    assert len({chunk["id"] for chunk in made}) == 1
    assert made[0]["id"].endswith("-7")
    if request_ is CHAT:
        roles = [chunk["choices"][0]["delta"].get("role") for chunk in made[:3]]
        assert roles == ["assistant", "assistant", None], "once for each answer"
    assert made[3]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, True),
        ({"stream": False}, True),
        ({"stream": True}, False),
        ({"stream": True, "stream_options": None}, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True),
    ],
)
def test_who_wants_token_counts(fields, wanted):
    assert TextChunks({**CHAT, **fields}, LocalContext("7")).wants_usage is wanted


@pytest.mark.parametrize("options", [7, [], {"continuous_usage_stats": True}])
def test_wrong_stream_options_are_refused(options):
    with pytest.raises(InvalidRequestError, match="stream_options"):
        TextChunks({**CHAT, "stream_options": options}, LocalContext("7"))


def test_a_field_that_is_not_honoured_is_refused_by_name():
    refuse_others({**CHAT, "stop": "x", "seed": None, "user": "u", "nvext": {}}, {"stop"})
    with pytest.raises(InvalidRequestError, match=r"^seed is not supported by this engine$"):
        refuse_others({**CHAT, "seed": 7}, {"stop"})


def test_max_tokens():
    assert max_tokens(CHAT) is None
    assert max_tokens({**CHAT, "max_tokens": 3}) == 3
    assert max_tokens({**CHAT, "max_tokens": 3, "max_completion_tokens": 2}) == 2
    for wrong in ("many", -1, 1.5, True):
        with pytest.raises(InvalidRequestError, match="max_tokens"):
            max_tokens({**CHAT, "max_tokens": wrong})


def test_stop_strings_of_a_request():
    assert stop_strings(CHAT) == ()
    assert stop_strings({**CHAT, "stop": "x"}) == ("x",)
    assert stop_strings({**CHAT, "stop": ["x", "yz"]}) == ("x", "yz")
    for wrong in (7, "", [""], [7], {}, ["x"] * 33, "x" * 257):
        with pytest.raises(InvalidRequestError, match="stop"):
            stop_strings({**CHAT, "stop": wrong})


def test_the_text_of_a_message():
    def chat(content: object) -> Any:
        return {**CHAT, "messages": [*CHAT["messages"], {"role": "user", "content": content}]}

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [last_message(chat(content)) for content in ("x", None, parts, [])] == ["x", "", "ab", ""]
    for wrong in (7, {}, [7], [{"type": "image_url"}], [{"type": "text", "text": 7}]):
        with pytest.raises(InvalidRequestError, match="messages"):
            last_message(chat(wrong))


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    stop = StopStrings(strings)
    sent = "".join(stop.take(text[first:last]) for first, last in pairwise([0, *cuts, len(text)]))
    if not stop.stopped:
        sent += stop.rest()
    # With the pieces of one character, nothing can be found later than it could have been.
    ends = [at for end in range(len(text) + 1) for string in strings if (at := text[:end].find(string)) >= 0]
    assert stop.stopped == bool(ends)
    if stop.stopped:
        assert text.startswith(sent)
        assert any(text[len(sent) :].startswith(string) for string in strings)
        assert stop.take("more") == stop.rest() == ""
    else:
        assert sent == text


def test_nothing_is_held_back_that_need_not_be():
    stop = StopStrings(["END"])
    assert [stop.take(text) for text in ("a", "bE", "N", "xE", "E", "ND", "c")] == ["a", "b", "", "ENx", "E", "", ""]
    assert stop.stopped
