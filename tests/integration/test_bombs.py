"""Requests that are small to send and large to read, as large as the limits allow, and beyond them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dynamo_worker.testing import Cluster

from .test_fuzz import VALID, check_answer, check_serving
from .watched import EXAMPLES, Client, Watched

#: Seconds of CPU that one request may take on the event loop. 106 kB of references took it a minute.
MOST_BUSY = 1.0


def chain(links: int) -> dict[str, Any]:
    """References that lead from one to the next, and in the end to something: 35 bytes each."""
    links_ = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**links_, f"d{links}": {"type": "string"}}}


def circle(links: int) -> dict[str, Any]:
    """References that lead back to the first, or look as if they did."""
    return {"$defs": {**chain(links)["$defs"], f"d{links}": {"$ref": "#/$defs/d0"}}, "$ref": "#/$defs/d0"}


def star(points: int) -> dict[str, Any]:
    """References that all lead to the same long chain."""
    return {**chain(points), "anyOf": [{"$ref": "#/$defs/d0"}] * points}


def fan(levels: int) -> dict[str, Any]:
    """References that double at each level."""
    both = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**both, f"d{levels}": {"type": "string"}}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


SCHEMAS = {
    "a chain of 55 kB": chain(1500),
    "a chain of 106 kB": chain(2900),
    "a chain of 1 MB": chain(28_000),
    "a circle of 106 kB": circle(2900),
    "a star": star(2000),
    "a fan": fan(3000),
    "wide": {"properties": {f"p{number}": {"type": "string"} for number in range(5000)}},
    "too wide": {"properties": {f"p{number}": {"type": "string"} for number in range(100_000)}},
    "deep": deep(31),
    "too deep": deep(100),
    "an enumeration": {"enum": list(range(200_000))},
    "a long pointer": {"$ref": "#" + "/a" * 100_000},
    "pointers with escapes": {"anyOf": [{"$ref": "#/" + "~1~0%25" * 100}] * 300},
}


def guided(**guide: object) -> dict[str, Any]:
    return {**VALID, "sampling_options": {"guided_decoding": guide}}


def forms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return requests for a schema in every form in which it may stand in one."""
    tag = {"format": {"type": "json_schema", "json_schema": schema}}
    return [
        guided(json=schema),
        guided(json=json.dumps(schema)),
        guided(structural_tag=tag),
        guided(structural_tag=json.dumps(tag)),
    ]


def sampling(**values: object) -> dict[str, Any]:
    return {**VALID, "sampling_options": values}


def extra(**values: object) -> dict[str, Any]:
    return {**VALID, "extra_args": {"sampling_options": values}}


def stop(**values: object) -> dict[str, Any]:
    return {**VALID, "stop_conditions": {"max_tokens": 3, **values}}


BOMBS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    **{f"schema: {name}": lambda schema=schema: forms(schema) for name, schema in SCHEMAS.items()},
    "text of a schema": lambda: [
        guided(json=text) for text in ("[" * 200_000, '{"a":' * 50_000, '{"a": ' + "1" * 250_000 + "}", " " * 250_000)
    ],
    "regex": lambda: [guided(regex="(a|b)*" * 1300), guided(regex="(" * 1_000_000), guided(regex="(.*){1000}" * 800)],
    "grammar": lambda: [guided(grammar="a ::= b\n" * 8000), guided(grammar="x" * 5_000_000)],
    "choices": lambda: [
        guided(choice=["x" * 13] * 10_000),
        guided(choice=["x"] * 500_000),
        guided(choice=["x" * 1_000_000] * 3),
    ],
    "stop tokens": lambda: [
        stop(stop_token_ids_hidden=list(range(1024)), stop_token_ids=list(range(1024))),
        stop(stop_token_ids_hidden=[7] * 1_000_000),
        {**VALID, "eos_token_ids": [7] * 1_000_000},
    ],
    "stop strings": lambda: [stop(stop=["x"] * 300_000), stop(stop=["x" * 1_000_000] * 4)],
    "biases": lambda: [
        extra(logit_bias={str(token): 1.5 for token in range(4096)}),
        extra(logit_bias={str(token): 1.5 for token in range(300_000)}),
        extra(logit_bias={"1" * 100_000: 1.5}),
        extra(logit_bias={"1": 10**18, "-1": -(10**18)}),
    ],
    "allowed tokens": lambda: [
        extra(allowed_token_ids=list(range(2**18))),
        extra(allowed_token_ids=[1] * 2_000_000),
        extra(allowed_token_ids=[1.0] * 2**18),
        extra(logprob_token_ids=["x"] * 500_000),
    ],
    "answers": lambda: [sampling(n=number, best_of=number) for number in (128, 129, 10**6, 2**63, -1, 1e300)],
    "log-probabilities": lambda: [
        {**VALID, "output_options": {"logprobs": 10**9, "prompt_logprobs": 10**9}},
        {"token_ids": [70] * 130_000, "output_options": {"prompt_logprobs": 20}},
    ],
    "names": lambda: [
        {**VALID, "model": "x" * 5_000_000},
        {**VALID, "routing": {"lora_name": "\0" * 1_000_000, "cache_salt": "x" * 1_000_000}},
        {**VALID, "routing": {"cache_salt": "x" * 1024, "priority": 2**62}},
        {**VALID, "agent_context": {"session_id": " " * 2_000_000}},
    ],
    "objects": lambda: [
        {**VALID, "kv_hint": SCHEMAS["too wide"]},
        extra(custom_params=SCHEMAS["too wide"]),
        extra(custom_params=deep(60)),
        {**VALID, "annotations": ["x:y"] * 300_000},
        {**VALID, **{f"unknown{number}": None for number in range(200_000)}},
        sampling(**{f"unknown{number}": None for number in range(200_000)}),
    ],
    "the longest prompt": lambda: [{"token_ids": [70] * 131_071, "stop_conditions": {"max_tokens": 2**63 - 1}}],
}


@pytest.mark.timeout(1800)
def test_no_request_holds_a_worker(cluster: Cluster) -> None:
    with Watched(cluster, "--engine", "strict") as watched, Client(cluster) as client:
        for name, make in BOMBS.items():
            for number, bomb in enumerate(make()):
                before = watched.busy()
                (answer,) = client.ask(bomb)
                busy = watched.busy() - before
                print(f"\n{name} {number}: {busy:.3f} s, {str(answer[1])[:90]}", end="")
                check_answer(answer)
                assert busy <= MOST_BUSY, name
        check_serving(client)
        # The first time the runtime takes memory for good.
        watched.begin()
        for _ in range(max(1, EXAMPLES // 500)):
            for make in BOMBS.values():
                for bomb in make():
                    check_answer(client.ask(bomb)[0])
            check_serving(client)
        watched.end()
