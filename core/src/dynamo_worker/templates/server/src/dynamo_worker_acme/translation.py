"""Which fields of a request the server gets; all others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_worker.kit import fields
from dynamo_worker.kit.text import is_chat, max_tokens, refuse_others, stop_strings

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Fields that go to the server under their names, each with what reads it: a wrong value is its client's mistake, which
#: must not become the server's failure. Add what your server can do, such as `"response_format": fields.mapping`. The
#: toy has one answer to everything, so it need not look at those that say how to sample.
FIELDS = {
    **dict.fromkeys(("temperature", "top_p"), fields.number),
    "seed": fields.integer,
    "n": fields.unsupported(1),
}
#: Fields that are read below.
_READ = ("max_tokens", "max_completion_tokens", "stop")


def body(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for the server, without what says how the answer is sent.

    :raises InvalidRequestError: a field is not supported, or its value is wrong.
    """
    refuse_others(request, {*FIELDS, *_READ})
    prompt = "messages" if is_chat(request) else "prompt"
    body = {"model": request["model"], prompt: request[prompt], "max_tokens": max_tokens(request)}
    body["stop"] = list(stop_strings(request)) or None
    for name, read in FIELDS.items():
        if request.get(name) is not None:
            body[name] = read(name, request[name])
    return {name: value for name, value in body.items() if value is not None}
