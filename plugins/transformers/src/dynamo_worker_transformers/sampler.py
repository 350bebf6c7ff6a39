"""How the next tokens are chosen: each row of a batch by its own request's parameters.

transformers' batching loop has one set of logits processors, of which three (temperature, ``top_k``, ``top_p``) can
differ from request to request, and one random generator. :class:`RequestSampler` is one processor in their place,
through their own interface. In each row it makes the token to choose the likeliest one, and the loop takes the maximum.
The noise that makes this a draw from the distribution is Gumbel's, from the request's own generator if it has a seed.
"""

from __future__ import annotations

import math
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from dynamo_worker_transformers.adapters import KEY as ADAPTER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers.generation.continuous_batching.requests import RequestState
    from typing_extensions import Self

    from dynamo_worker_transformers.adapters import Adapters

#: The name under which the loop carries a request's parameters.
KEY: Final = "sampling"
#: The smallest sample of the exponential distribution: 0 would make the noise infinite.
_LEAST: Final = 1e-20


class Logprobs(NamedTuple):
    """The log probabilities at one position, from the model's own distribution: natural logarithms.

    :param chosen: of the chosen token.
    :param rank: of the chosen token; 1 is the likeliest.
    :param tokens: the likeliest tokens, in descending order.
    :param values: their log probabilities.
    """

    chosen: float
    rank: int
    tokens: list[int]
    values: list[float]


class Sampling:
    """The parameters of one request, and what its steps leave behind.

    :ivar logprobs: those of the tokens that have been chosen and not yet taken, oldest first.
    """

    def __init__(self, given: Mapping[str, Any], device: torch.device) -> None:
        """Take the parameters, as the worker has checked them (``sampling.py``)."""
        self.temperature = float(given.get("temperature", 1.0))
        self.top_k = int(given.get("top_k", 0))
        self.top_p = float(given.get("top_p", 1.0))
        self.min_p = float(given.get("min_p", 0.0))
        self.presence = float(given.get("presence_penalty", 0.0))
        self.frequency = float(given.get("frequency_penalty", 0.0))
        self.repetition = float(given.get("repetition_penalty", 1.0))
        self.min_tokens = int(given.get("min_tokens", 0))
        self.top_logprobs: int | None = given.get("logprobs")
        self.logprobs: deque[Logprobs] = deque()
        self._ends = torch.tensor(sorted(given.get("ends", ())), dtype=torch.int64, device=device)
        bias: Mapping[Any, float] = given.get("logit_bias") or {}
        self._biased = torch.tensor([int(token) for token in bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._counted = 0
        self.generator: torch.Generator | None = None
        if (seed := given.get("seed")) is not None:
            self.generator = torch.Generator(device).manual_seed(seed % 2**63)

    def __deepcopy__(self, _: object) -> Self:
        """Return itself: the loop copies the parameters when it starts a request anew for want of room."""
        return self

    @property
    def penalized(self) -> bool:
        """Whether tokens that occurred change the distribution."""
        return self.presence != 0.0 or self.frequency != 0.0 or self.repetition != 1.0

    @cached_property
    def plain(self) -> bool:
        """Whether the likeliest token is the answer, and nothing else is asked for."""
        return (
            self.temperature == 0.0
            and not self.penalized
            and not self.min_tokens
            and self.top_logprobs is None
            and not len(self._biased)
        )

    def adjust(self, row: torch.Tensor, state: RequestState) -> None:
        """Change one row of logits in place by all that goes before the temperature.

        :param row: one logit per token.
        :param state: of the request in the loop.
        """
        if len(self._biased):
            row.index_add_(0, self._biased, self._bias.to(row.dtype))
        if self.penalized:
            counts, seen = self._count(row, state)
            if self.repetition != 1.0:
                row.copy_(torch.where(seen, torch.where(row > 0, row / self.repetition, row * self.repetition), row))
            row.sub_(self.frequency * counts + self.presence * (counts > 0))
        if self.min_tokens and len(self._ends) and _made(state) < self.min_tokens:
            row[self._ends] = -math.inf

    def _count(self, row: torch.Tensor, state: RequestState) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how often each token is in the answer, and whether it is in the prompt or the answer."""

        def tokens(ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor(ids, dtype=torch.int64, device=row.device)

        first = len(state.initial_tokens) + len(state.generated_tokens) - _made(state)
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros_like(row)
            self._seen = torch.zeros_like(row, dtype=torch.bool)
            self._seen[tokens(state.initial_tokens[:first])] = True
        if first < len(state.initial_tokens):
            new = (state.initial_tokens[first:] + state.generated_tokens)[self._counted :]
        else:
            new = state.generated_tokens[self._counted :]
        self._counts.index_add_(0, tokens(new), torch.ones(len(new), dtype=row.dtype, device=row.device))
        self._seen[tokens(new)] = True
        self._counted += len(new)
        return self._counts, self._seen


def _made(state: RequestState) -> int:
    """Return the number of tokens chosen so far, those before a restart included: the prompt then ends with them."""
    before = len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0  # noqa: SLF001
    return before + len(state.generated_tokens)


class _Row(NamedTuple):
    """A row of the batch that needs more than its maximum."""

    number: int
    sampling: Sampling
    state: RequestState


class RequestSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens of a batch."""

    supported_kwargs: ClassVar[dict[str, type]] = {KEY: Sampling}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[_Row] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Fill the loop's own storage, of which nothing is read."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Remember whose rows the next batch has."""
        self._rows = []
        for number, request in enumerate(requests_with_new_token):
            sampling = request.state.logit_processor_kwargs.get(KEY)
            if sampling is not None and not sampling.plain:
                self._rows.append(_Row(number, sampling, request.state))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the scores, of which the loop takes each row's maximum.

        :param scores: one row of logits per request with a new token, [requests, vocabulary].
        """
        if not self._rows:
            return scores
        reporting = [row for row in self._rows if row.sampling.top_logprobs is not None]
        raw = torch.log_softmax(scores[[row.number for row in reporting]], dim=-1) if reporting else None
        scores = scores.clone()
        for row in self._rows:
            row.sampling.adjust(scores[row.number], row.state)
        drawn = [row for row in self._rows if row.sampling.temperature > 0.0]
        if drawn:
            index = [row.number for row in drawn]
            scores[index] = _draw(scores[index], [row.sampling for row in drawn])
        if raw is not None:
            _report(raw, scores, reporting)
        return scores


class _Processors(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The loop's list of processors, with the sampler alone; the adapters are told as well what a batch contains."""

    def __init__(self, sampler: RequestSampler, adapters: Adapters | None) -> None:
        super().__init__(LogitsProcessorList(), per_request_processors=True)
        self._adapters = adapters
        self.logits_processor = LogitsProcessorList([sampler])
        self.tensors_required = 1
        self.supported_keys = {**sampler.supported_kwargs, ADAPTER: int}
        self.do_processing = True

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        if self._adapters is not None:
            self._adapters.prepare(requests_in_batch)
        stored: torch.Tensor = super().prepare_tensor_args(requests_in_batch, arg_storage)
        return stored


def processors(sampler: RequestSampler, adapters: Adapters | None = None) -> ContinuousBatchingLogitsProcessorList:
    """Return the loop's list of processors, with the sampler alone.

    :param adapters: told what each batch contains.
    """
    return _Processors(sampler, adapters)


def _draw(scores: torch.Tensor, parameters: Sequence[Sampling]) -> torch.Tensor:
    """Return scores whose maxima are samples of the distributions."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device).unsqueeze(-1)

    scores = scores / column([each.temperature for each in parameters])
    if any(each.min_p > 0.0 for each in parameters):
        least = scores.amax(dim=-1, keepdim=True) + column([math.log(max(p.min_p, _LEAST)) for p in parameters])
        scores = scores.masked_fill(scores < least, -math.inf)
    if any(each.top_k > 0 or each.top_p < 1.0 for each in parameters):
        scores = _likeliest(scores, parameters, column)
    noise = torch.empty_like(scores)
    unseeded = [index for index, each in enumerate(parameters) if each.generator is None]
    if len(unseeded) == len(parameters):
        noise.exponential_()
    else:
        if unseeded:
            noise[unseeded] = torch.empty_like(scores[unseeded]).exponential_()
        for index, each in enumerate(parameters):
            if each.generator is not None:
                noise[index].exponential_(generator=each.generator)
    return scores - noise.clamp_min_(_LEAST).log_()


def _likeliest(scores: torch.Tensor, parameters: Sequence[Sampling], column: Any) -> torch.Tensor:
    """Return the scores without the tokens that ``top_k`` and then ``top_p`` leave out."""
    ordered, order = torch.sort(scores, dim=-1, descending=True)
    size = scores.size(-1)
    kept = [min(each.top_k, size) if each.top_k > 0 else size for each in parameters]
    places = torch.arange(size, device=scores.device)
    ordered = ordered.masked_fill(places >= column([float(k) for k in kept]), -math.inf)
    if any(each.top_p < 1.0 for each in parameters):
        masses = ordered.softmax(dim=-1)
        before = masses.cumsum(dim=-1) - masses
        # The likeliest token stays, however small top_p is.
        out = (before >= column([each.top_p if each.top_p < 1.0 else math.inf for each in parameters])) & (places > 0)
        ordered = ordered.masked_fill(out, -math.inf)
    return torch.full_like(scores, -math.inf).scatter_(-1, order, ordered)


def _report(raw: torch.Tensor, scores: torch.Tensor, rows: Sequence[_Row]) -> None:
    """Give the rows' requests the log probabilities of the tokens that are being chosen.

    :param raw: the model's own, one row for each of ``rows``.
    :param scores: of the whole batch, as they are returned.
    """
    chosen = scores[[row.number for row in rows]].argmax(dim=-1, keepdim=True)
    values = raw.gather(-1, chosen)
    ranks = (raw > values).sum(dim=-1) + 1
    most = max(row.sampling.top_logprobs or 0 for row in rows)
    tops = torch.topk(raw, min(most, raw.size(-1)), dim=-1) if most else None
    top_values, top_tokens = ([[]] * len(rows),) * 2 if tops is None else (tops.values.tolist(), tops.indices.tolist())
    for number, (row, value, rank) in enumerate(zip(rows, values.squeeze(-1).tolist(), ranks.tolist(), strict=True)):
        count = row.sampling.top_logprobs or 0
        row.sampling.logprobs.append(Logprobs(value, rank, top_tokens[number][:count], top_values[number][:count]))
