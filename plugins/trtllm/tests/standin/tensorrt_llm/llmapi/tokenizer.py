"""The tokenizer of a model: Hugging Face's, wrapped as the real package wraps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TokenizerBase:
    """What a tokenizer must be able to do."""

    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Return the token ids of a text."""
        raise NotImplementedError

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Return the text of token ids."""
        raise NotImplementedError


class TransformersTokenizer(TokenizerBase):
    """A tokenizer of `transformers`, which is the attribute `tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_dir: str | Path, **kwargs: Any) -> TransformersTokenizer:
        """Read the tokenizer of a folder; raises OSError where there is none."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(pretrained_model_dir, **kwargs))

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return list(self.tokenizer.encode(text, **kwargs))

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return str(self.tokenizer.decode(list(token_ids), **kwargs))

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)


def tokenizer_factory(obj: Any = None, **kwargs: Any) -> Any:
    """Return a tokenizer: as given, of a folder, or None for None."""
    if isinstance(obj, (str, Path)):
        return TransformersTokenizer.from_pretrained(obj, **kwargs)
    return obj
