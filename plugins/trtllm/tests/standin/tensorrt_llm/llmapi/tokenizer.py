"""The tokenizer of a model folder, without `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


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
    """The tokenizer in `tokenizer.json`, its EOS in `tokenizer_config.json` or `config.json`."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int | None, pad_token_id: int | None) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_dir: str | Path, **_: Any) -> TransformersTokenizer:
        """Read the tokenizer of a folder; raises FileNotFoundError where there is none."""
        folder = Path(pretrained_model_dir)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        tokenizer = Tokenizer.from_file(str(path))
        found: dict[str, int | None] = {}
        for name in ("eos", "pad"):
            token = _read(folder / "tokenizer_config.json").get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found[name] = tokenizer.token_to_id(token) if token else None
            if found[name] is None:
                ids = _read(folder / "config.json").get(f"{name}_token_id")
                found[name] = ids[0] if isinstance(ids, list) else ids
        return cls(tokenizer, found["eos"], found["pad"])

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True, **_: Any) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, **kwargs)}


def tokenizer_factory(obj: Any = None, **kwargs: Any) -> Any:
    """Return a tokenizer: as given, of a folder, or None for None."""
    if isinstance(obj, (str, Path)):
        return TransformersTokenizer.from_pretrained(obj, **kwargs)
    return obj


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return loaded
