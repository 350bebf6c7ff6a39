"""How tokens are chosen: by each row's own parameters, and from the right distribution."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynamo_worker_transformers.sampler import KEY, RequestSampler, Sampling, processors

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def state(sampling: Sampling, prompt: list[int] | None = None, answer: list[int] | None = None, first: int = 0) -> Any:
    """Return a request as the loop has it.

    :param first: tokens of the prompt that it began with, after a restart.
    """
    return SimpleNamespace(
        logit_processor_kwargs={KEY: sampling},
        initial_tokens=prompt or [4],
        generated_tokens=answer or [],
        _true_initial_tokens=first,
    )


def chosen(states: list[Any], logits: torch.Tensor | None = None) -> list[int]:
    """Return the tokens that a step chooses."""
    sampler = RequestSampler()
    arguments = sampler.prepare_tensor_args([SimpleNamespace(state=each) for each in states])
    scores = (LOGITS if logits is None else logits).repeat(len(states), 1)
    before = scores.clone()
    tokens: list[int] = sampler(scores, arguments).argmax(dim=-1).tolist()
    assert torch.equal(scores, before), "the loop's own tensor was changed"
    return tokens


def sampling(**given: Any) -> Sampling:
    return Sampling({"temperature": 0.0, **given}, CPU)


def shares(number: int = 3000, **given: Any) -> list[float]:
    """Return how often each token is chosen."""
    torch.manual_seed(0)
    tokens = chosen([state(sampling(**{"temperature": 1.0, **given})) for _ in range(number)])
    return [tokens.count(token) / number for token in range(5)]


def test_greedy_rows_cost_nothing() -> None:
    sampler = RequestSampler()
    arguments = sampler.prepare_tensor_args([SimpleNamespace(state=state(sampling()))])
    scores = LOGITS.repeat(1, 1)
    assert sampler(scores, arguments) is scores


@pytest.mark.parametrize(
    ("given", "kept", "temperature"),
    [
        ({}, 5, 1.0),
        ({"temperature": 2.0}, 5, 2.0),
        ({"top_k": 2}, 2, 1.0),
        ({"top_k": 100}, 5, 1.0),
        ({"top_p": 0.7}, 2, 1.0),  # 0.64 is not enough
        ({"top_p": 0.0}, 1, 1.0),
        ({"min_p": 0.2}, 2, 1.0),  # 0.135 of the likeliest is too little
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.01}, 3, 1.0),
    ],
    ids=str,
)
def test_the_distribution(given: dict[str, Any], kept: int, temperature: float) -> None:
    expected = torch.softmax(LOGITS[:kept] / temperature, dim=-1).tolist() + [0.0] * (5 - kept)
    for share, right in zip(shares(**given), expected, strict=True):
        assert share == pytest.approx(right, abs=0.03 if right else 0.0)


def test_a_seed_is_the_requests_own() -> None:
    def answer(seed: int, neighbours: int) -> list[int]:
        own = state(sampling(temperature=5.0, seed=seed))
        others = [state(sampling(temperature=5.0)) for _ in range(neighbours)]
        return [chosen([*others, own])[-1] for _ in range(20)]

    assert answer(7, 0) == answer(7, 3) != answer(8, 0)
    assert answer(-1, 0) == answer(-1, 0)


def test_rows_differ() -> None:
    """Each by its own parameters, in one batch."""
    states = [
        state(sampling()),
        state(sampling(logit_bias={"3": 50.0})),
        state(sampling(temperature=1.0, top_k=1, logit_bias={"4": 50.0})),
        state(sampling(ends=[0], min_tokens=2), answer=[1]),
        state(sampling(ends=[0], min_tokens=1), answer=[1]),
    ]
    assert chosen(states) == [0, 3, 4, 1, 0]


@pytest.mark.parametrize(
    ("given", "answer", "token"),
    [
        ({"presence_penalty": 0.9}, [0], 0),
        ({"presence_penalty": 1.1}, [0], 1),
        ({"frequency_penalty": 0.6}, [0], 0),
        ({"frequency_penalty": 0.6}, [0, 0], 1),
        ({"repetition_penalty": 3.0}, [0], 1),
        ({"repetition_penalty": 3.0}, [], 0),
        ({"presence_penalty": -2.0}, [1], 1),
    ],
    ids=str,
)
def test_penalties(given: dict[str, Any], answer: list[int], token: int) -> None:
    assert chosen([state(sampling(**given), answer=answer)]) == [token]


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    assert chosen([state(sampling(repetition_penalty=3.0), prompt=[0])]) == [1]
    assert chosen([state(sampling(presence_penalty=2.0, frequency_penalty=2.0), prompt=[0])]) == [0]


def test_tokens_count_once_over_the_steps_and_a_restart() -> None:
    """The loop restarts a request for want of room: the prompt then ends with the tokens chosen before."""
    own = sampling(frequency_penalty=0.3)
    assert chosen([state(own, answer=[0])]) == [0]
    assert chosen([state(copy.deepcopy(own), answer=[0, 0])]) == [0]
    assert chosen([state(own, prompt=[4, 0, 0], answer=[0], first=1)]) == [0]
    assert chosen([state(own, prompt=[4, 0, 0], answer=[0, 0], first=1)]) == [1]
    late = sampling(ends=[0], min_tokens=3)
    assert chosen([state(late, prompt=[4, 1, 1], first=1)]) == [1]
    assert chosen([state(late, prompt=[4, 1, 1], answer=[1], first=1)]) == [0]


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0, "logit_bias": {"2": 60.0}}], ids=str)
def test_log_probabilities_are_the_models_own(given: dict[str, Any]) -> None:
    """Whatever the parameters have made of them."""
    wanted, unwanted = sampling(logprobs=2, **given), sampling()
    (token, _) = chosen([state(wanted), state(unwanted)])
    (found,) = wanted.logprobs
    right = torch.log_softmax(LOGITS, dim=-1)
    assert token == (2 if given else 0)
    assert found.chosen == pytest.approx(right[token].item())
    assert found.rank == token + 1
    assert found.tokens == [0, 1]
    assert found.values == pytest.approx(right[:2].tolist())
    assert not unwanted.logprobs


def test_no_more_log_probabilities_than_tokens() -> None:
    wanted = [sampling(logprobs=count) for count in (0, 3, 100)]
    chosen([state(each) for each in wanted])
    assert [len(each.logprobs[0].tokens) for each in wanted] == [0, 3, 5]


def test_numbers_at_the_edge() -> None:
    """The hottest and the coldest distribution, and no token with a chance but one."""
    states = [state(sampling(temperature=temperature)) for temperature in (0.01, 3e38)]
    for logits in (LOGITS * 1e4, torch.tensor([-math.inf, -math.inf, 0.0, -math.inf, -math.inf])):
        tokens = chosen(states, logits)
        assert all(math.isfinite(logits[token]) for token in tokens)


def test_the_loops_list_knows_the_parameters() -> None:
    every = processors(RequestSampler())
    every.check_kwargs({KEY: sampling()})
    with pytest.raises(ValueError, match="Unknown"):
        every.check_kwargs({"top_h": 1})
