"""A model that makes embeddings, in the engine's own process: its files, its tokenizer, and one batch at a time."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from dynamo_worker import InvalidRequestError
from dynamo_worker_transformers.batches import LoadError, explained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What a list of modules for sentence-transformers may have, by the last part of the module's type.
_MODULES: Final = ("Transformer", "Pooling", "Normalize")
#: The poolings of sentence-transformers, by the switches of its older files.
_SWITCHES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Final = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
#: Values beyond it mean "no limit" in a tokenizer's configuration.
_NO_LIMIT: Final = 10**9


class Recipe(NamedTuple):
    """How a model's files say that vectors are made.

    :param pooling: one of ``arguments.POOLINGS``.
    :param normalize: whether vectors get the length 1.
    :param longest: longest input in tokens; None if the files say nothing.
    """

    pooling: str
    normalize: bool
    longest: int | None


class EmbeddingModel:
    """A loaded model.

    :ivar context_length: longest input in tokens.
    :ivar dimensions: numbers in a vector.
    :ivar shorter: the lengths to which vectors can be cut; True for any.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Load the model as the flags say (``arguments.py``); takes seconds to minutes.

        :raises LoadError: it cannot be loaded.
        """
        transformers.utils.logging.disable_progress_bar()
        path, trust = settings["model"], settings["trust_remote_code"]
        with explained(path):
            self.recipe = recipe = _recipe(path, settings)
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
            attention = settings["attn_implementation"]
            module, report = AutoModel.from_pretrained(
                path,
                config=config,
                dtype=settings["dtype"],
                trust_remote_code=trust,
                output_loading_info=True,
                **({} if attention is None else {"attn_implementation": attention}),
            )
            # A layer on top of the first token's vector, which nothing here uses.
            if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
                raise LoadError(
                    f"the weights of {path} are incomplete: {len(missing)} tensors are missing, as {missing[0]}"
                )
            self.device = torch.device(settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.module = module.to(self.device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        text = config.get_text_config()
        self.context_length = _context_length(path, settings["max_model_len"], recipe, text, self._tokenizer)
        self.dimensions: int = text.hidden_size
        self.vocabulary: int = module.get_input_embeddings().num_embeddings
        self.shorter: bool | list[int] = settings["matryoshka"] or bool(getattr(config, "is_matryoshka", False))
        if sizes := getattr(config, "matryoshka_dimensions", None):
            self.shorter = sorted({int(size) for size in sizes if 0 < int(size) <= self.dimensions})
        self._padding: int = self._tokenizer.pad_token_id or 0

    def tokens(self, one: str | list[int], limit: int | None, special: bool | None) -> list[int]:
        """Return the tokens of an input.

        :param limit: cut a text to so many tokens, to the context length if it is -1.
        :param special: whether to add special tokens to a text; None as the tokenizer does it.
        :raises InvalidRequestError: there are none, or too many.
        """
        found = self._tokenized(one, limit, special) if isinstance(one, str) else one
        if not found:
            raise InvalidRequestError("input: an input has no tokens")
        if len(found) > self.context_length:
            raise InvalidRequestError(
                f"input: an input has {len(found)} tokens; the model's context length is {self.context_length}"
            )
        return found

    def _tokenized(self, text: str, limit: int | None, special: bool | None) -> list[int]:
        options: dict[str, Any] = {} if special is None else {"add_special_tokens": special}
        longest = None if limit is None else self.context_length if limit == -1 else min(limit, self.context_length)
        # The tokenizer keeps its special tokens, and fails if nothing else would be left.
        if longest is not None and longest > self._tokenizer.num_special_tokens_to_add():
            options |= {"truncation": True, "max_length": longest}
        found: list[int] = self._tokenizer(text, verbose=False, **options)["input_ids"]
        return found[:longest]

    def vectors(self, batch: Sequence[list[int]]) -> torch.Tensor:
        """Return the vectors of a batch, before they are cut or get the length 1, as 32-bit floats on the CPU."""
        longest = max(map(len, batch))
        tokens = torch.tensor([one + [self._padding] * (longest - len(one)) for one in batch])
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in batch])
        with torch.inference_mode():
            return self._pooled(tokens.to(self.device), mask.to(self.device)).cpu()

    def _pooled(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.module(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        if self.recipe.pooling == "cls":
            return hidden[:, 0]
        if self.recipe.pooling == "last":
            return hidden[torch.arange(len(hidden), device=self.device), mask.sum(1) - 1]
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1)

    def finished(self, vector: torch.Tensor, dimensions: int | None) -> bytes:
        """Return a vector as clients get it: the bytes of little-endian 32-bit floats.

        :param dimensions: cut it to so many numbers.
        """
        if dimensions is not None:
            vector = vector[:dimensions]
        if self.recipe.normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        found: bytes = vector.numpy().astype("<f4").tobytes()
        return found


def _context_length(path: str, given: int | None, recipe: Recipe, text: Any, tokenizer: Any) -> int:
    if given is not None:
        return given
    limit = tokenizer.model_max_length
    lengths = (recipe.longest, getattr(text, "max_position_embeddings", None), limit if limit < _NO_LIMIT else None)
    known = [length for length in lengths if length]
    if not known:
        raise LoadError(f"config.json of {path} states no context length: set --max-model-len")
    return min(known)


def _recipe(path: str, settings: Mapping[str, Any]) -> Recipe:
    """Return how vectors are made: as the flags say, or else as the model's files for sentence-transformers do.

    :raises LoadError: the files want what this engine does not do.
    """
    modules = _read(path, "modules.json")
    if not isinstance(modules, list):
        return Recipe(settings["pooling"] or "mean", settings["normalize"], None)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    others = [kind for kind in kinds if kind not in _MODULES]
    if others:
        raise LoadError(
            f"{path} is not served: modules.json has {', '.join(others)}, and only {', '.join(_MODULES)} are known"
        )
    pooling = settings["pooling"]
    if pooling is None:
        places = [str(module.get("path")) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
        pooling = _pooling(path, _read(path, os.path.join(places[0], "config.json")) if places else None)
    limits = _read(path, "sentence_bert_config.json")
    longest = limits.get("max_seq_length") if isinstance(limits, dict) else None
    return Recipe(pooling, settings["normalize"] and "Normalize" in kinds, longest)


def _pooling(path: str, config: Any) -> str:
    """Return the pooling that a model's file names.

    :raises LoadError: it names none, several or another one.
    """
    config = config if isinstance(config, dict) else {}
    named = config.get("pooling_mode")
    if isinstance(named, str):
        wanted = [named]
    else:
        wanted = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    found = [(_NAMES | _SWITCHES).get(name) for name in wanted]
    if len(found) != 1 or found[0] is None:
        raise LoadError(
            f"{path} is not served: its pooling is {' and '.join(wanted) or 'unknown'}; mean, cls and last are known: "
            "set --pooling if one of them will do"
        )
    return found[0]


def _read(path: str, name: str) -> Any:
    """Return what a JSON file of a model contains; None if there is none."""
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return json.load(file)
