"""The model directory that all workers register: the echo engine's own, or a tiny one made here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")


def model_directory(work_directory: Path) -> Path:
    """Return a directory with `config.json` and a byte-level tokenizer (one token per byte).

    The one packaged with the echo engine is taken where dynamo-worker is installed, so that all workers of a
    comparison register the same files.
    """
    spec = importlib.util.find_spec("dynamo_worker")
    for root in spec.submodule_search_locations or () if spec else ():
        for tokenizer in sorted(Path(root).glob("engines/**/tokenizer.json")):
            if (tokenizer.parent / "config.json").exists():
                return tokenizer.parent
    return _write(work_directory / "model")


def _write(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(_SPECIAL)}
    for byte, character in sorted(_byte_characters().items()):
        vocabulary[character] = len(_SPECIAL) + byte
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    tokenizer_config = {
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "pad_token": _SPECIAL[2],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 131072,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for name, content in {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
    }.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


def _byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return characters
