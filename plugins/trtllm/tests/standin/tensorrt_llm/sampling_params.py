"""Sampling parameters of one request: the fields, defaults and checks of the real package, without torch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    """Constrain the answer by at most one guide."""

    json: str | dict[str, Any] | Any | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None

    def _validate(self) -> None:
        guides = sum(bool(getattr(self, entry.name)) for entry in fields(self))
        if guides > 1:
            raise ValueError(f"guided decoding: expected at most one guide, got {guides}")


class LogitsProcessor(ABC):
    """Change the logits of one request in place."""

    @abstractmethod
    def __call__(
        self, req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None: ...


class BatchedLogitsProcessor(ABC):
    """Change the logits of a batch in place."""

    @abstractmethod
    def __call__(
        self,
        req_ids: list[int],
        logits: list[Any],
        token_ids: list[list[list[int]]],
        stream_ptr: int,
        client_ids: list[int | None],
    ) -> None: ...


@dataclass(slots=True, kw_only=True)
class AdditionalModelOutput:
    """Name one more output of the model to return."""

    name: str
    gather_context: bool


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; raises ValueError for a bad combination."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    _bad_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    _stop_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)

    embedding_bias: Any | None = None
    logits_processor: LogitsProcessor | list[LogitsProcessor] | None = None
    apply_batched_logits_processor: bool = False

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False

    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: list[int] | None = None

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[AdditionalModelOutput] | None = None
    _context_logits_auto_enabled: bool = False
    _generation_logits_auto_enabled: bool = False
    _return_log_probs: bool = False

    lookahead_config: Any | None = None
    guided_decoding: GuidedDecodingParams | None = None

    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    _stream_interval: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of if self.best_of is not None else self.n
        self._validate()

    def _validate(self) -> None:
        assert self.best_of is not None
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: expected a number from 0 to 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (all) or more, got {self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.best_of < self.n:
            raise ValueError(f"best_of: expected at least n ({self.n}), got {self.best_of}")
        if self.best_of > 1 and self._greedy_decoding and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING"):
            raise ValueError(
                f"best_of: greedy decoding gives one answer, got {self.best_of}; "
                "set temperature, top_k or top_p, or TLLM_ALLOW_N_GREEDY_DECODING=1"
            )
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise ValueError(f"truncate_prompt_tokens: expected 1 or more, got {self.truncate_prompt_tokens}")
        if self.guided_decoding is not None:
            self.guided_decoding._validate()
        self.logprobs = self.logprobs and int(self.logprobs)
        self.prompt_logprobs = self.prompt_logprobs and int(self.prompt_logprobs)

    @property
    def _greedy_decoding(self) -> bool:
        if self.use_beam_search:
            return False
        if self.temperature is None and self.top_k is None and self.top_p is None:
            return True
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def _need_return_context_logits(self) -> bool:
        return self.return_context_logits and not self._context_logits_auto_enabled

    @property
    def _need_return_generation_logits(self) -> bool:
        return self.return_generation_logits and not self._generation_logits_auto_enabled

    def _setup(self, tokenizer: Any, add_special_tokens: bool = False) -> SamplingParams:
        """Take EOS, padding and the ids of stop and bad words from the tokenizer."""
        if self.end_id is None:
            self.end_id = tokenizer.eos_token_id
            self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.end_id
        if self.bad is not None:
            self._bad_word_ids = [_encode(tokenizer, word, add_special_tokens) for word in _as_list(self.bad)]
        if self.stop is not None:
            self._stop_word_ids = [_encode(tokenizer, word, add_special_tokens) for word in _as_list(self.stop)]
        return self

    def _stop_sequences(self) -> list[tuple[int | str, list[int]]]:
        """Return each stop reason with its token ids, in the order in which they are looked for."""
        found: list[tuple[int | str, list[int]]] = [(token, [token]) for token in self.stop_token_ids or []]
        if self.stop is not None:
            if self._stop_word_ids is None:
                raise RuntimeError(f"stop {self.stop!r} was not tokenized; call _setup first")
            found += zip(_as_list(self.stop), self._stop_word_ids, strict=True)
        return found


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
