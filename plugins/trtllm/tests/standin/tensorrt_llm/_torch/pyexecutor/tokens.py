"""The made-up tokens: a fixed function of everything before them.

The next token depends on the whole sequence so far (prompt and answer alike), the adapter and, where the request
samples, on temperature, seed and sequence index. So a prompt that ends in the first tokens of an answer is continued
with the rest of that answer, as a greedy model would do: what migrates mid-stream goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tensorrt_llm.sampling_params import SamplingParams

_MASK = (1 << 64) - 1
_DEFAULT_VOCABULARY = 32000
_DEFAULT_POSITIONS = 2048


@dataclass(frozen=True)
class Vocabulary:
    """What the engine must know of a model: read from its config, defaults where there is none."""

    size: int = _DEFAULT_VOCABULARY
    eos: frozenset[int] = frozenset({2})
    special: frozenset[int] = frozenset({0, 1, 2})
    positions: int = _DEFAULT_POSITIONS

    @classmethod
    def of(cls, model: str) -> Vocabulary:
        """Read `config.json`, `generation_config.json` and `tokenizer.json` of a model folder."""
        folder = Path(model)
        config = _read(folder / "config.json")
        config = config.get("text_config", config)
        if "vocab_size" not in config:
            return cls()
        eos = {
            token
            for source in (config, _read(folder / "generation_config.json"))
            for token in _as_list(source.get("eos_token_id"))
        }
        special = {
            entry["id"] for entry in _read(folder / "tokenizer.json").get("added_tokens", []) if entry.get("special")
        }
        return cls(
            size=int(config["vocab_size"]),
            eos=frozenset(eos),
            special=frozenset(special | eos),
            positions=int(config.get("max_position_embeddings") or _DEFAULT_POSITIONS),
        )


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _as_list(value: object) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


class TokenSource:
    """Draw the tokens of one sequence. `eos_after` tokens end it with EOS; 0 means never."""

    def __init__(
        self, vocabulary: Vocabulary, prompt: list[int], params: SamplingParams, index: int = 0, lora: int = 0
    ) -> None:
        self._vocabulary = vocabulary
        self._state = 0
        self._salt = lora
        self.drawn = 0
        self._eos_after = int(os.environ.get("TLLM_STANDIN_EOS_AFTER", "0"))
        self._end_id = params.end_id if not params.ignore_eos else None
        # Sampling that leaves only the likeliest token is greedy, too.
        if not params._greedy_decoding and (params.top_p or 1.0) > 1e-3 and (params.min_p or 0.0) < 1.0:
            self._salt = hash((lora, index, params.seed or 0, params.temperature or 1.0)) & _MASK
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the sequence."""
        self._state = (self._state * 6364136223846793005 + token + 1442695040888963407) & _MASK

    def draw(self) -> int:
        """Return the next token, without appending it."""
        self.drawn += 1
        if self._eos_after and self.drawn > self._eos_after and self._end_id is not None and self._end_id >= 0:
            return self._end_id
        value = (self._state ^ (self._salt * 0x9E3779B97F4A7C15)) & _MASK
        value = ((value ^ (value >> 31)) * 0xBF58476D1CE4E5B9) & _MASK
        token = (value >> 17) % self._vocabulary.size
        while token in self._vocabulary.special:
            token = (token + 1) % self._vocabulary.size
        return token


def made_up_answer(
    vocabulary: Vocabulary, prompt: list[int], params: SamplingParams, length: int, index: int = 0, lora: int = 0
) -> list[int]:
    """Return the first `length` tokens that the engine answers `prompt` with."""
    source = TokenSource(vocabulary, prompt, params, index, lora)
    answer = []
    for _ in range(length):
        token = source.draw()
        source.push(token)
        answer.append(token)
    return answer
