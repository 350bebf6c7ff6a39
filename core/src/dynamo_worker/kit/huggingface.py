"""What a worker needs to know about a model, from its Hugging Face files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from dynamo_worker.errors import StartError

#: The parameters of ``generation_config.json`` that apply to requests which do not set them.
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelFiles:
    """The properties of a model.

    :ivar path: directory, or name on the Hugging Face Hub.
    :ivar config: configuration of its text part.
    :ivar tokenizer: its tokenizer; None without one.
    :ivar context_length: longest sequence in tokens.
    :ivar vocab_size: number of token ids.
    :ivar end_ids: tokens that end an answer.
    :ivar sampling: recommended sampling parameters, by Hugging Face's names.
    """

    path: str
    config: Any
    tokenizer: Any
    context_length: int
    vocab_size: int
    end_ids: tuple[int, ...]
    sampling: dict[str, Any]


def read(path: str, tokenizer: Any, context_length: int | None, *, trust_remote_code: bool = False) -> ModelFiles:
    """Read the properties of a model. Takes seconds: call it in a thread.

    :param tokenizer: the model's Hugging Face tokenizer; None without one.
    :param context_length: the operator's limit in tokens; None for the model's own.
    :raises StartError: the files are missing or broken, or state no context length.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read config.json of {path}: {error}") from error
    try:
        generation = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # many models have none
        generation = GenerationConfig.from_model_config(config)
    text = config.get_text_config()
    longest = context_length or getattr(text, "max_position_embeddings", None)
    if longest is None:
        raise StartError(f"config.json of {path} states no context length", hint="set the engine's limit")
    end = generation.eos_token_id
    if end is None:
        end = getattr(tokenizer, "eos_token_id", None)
    given = generation.to_diff_dict()
    return ModelFiles(
        path,
        text,
        tokenizer,
        int(longest),
        max(int(text.vocab_size), 0 if tokenizer is None else len(tokenizer)),
        tuple(end) if isinstance(end, (list, tuple)) else () if end is None else (int(end),),
        {name: given[name] for name in _SAMPLING if given.get(name) is not None},
    )
