"""A tiny model for llama.cpp: a random Llama of 2.8 million weights, 11 MB, whose every token is visible text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, WIDTH, HEADS, INNER = 4, 256, 8, 512
WEIGHT = 0.1
CONTEXT_LENGTH = 16_384
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make(path: Path) -> Path:
    """Write the model, always the same, and return its path."""
    writer = gguf.GGUFWriter(path, "llama")
    size = _add_tokens(writer)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(size)
    writer.add_chat_template(_CHAT_TEMPLATE)
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * WEIGHT).astype(np.float32)

    writer.add_tensor("token_embd.weight", weights(size, WIDTH))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    output = weights(size, WIDTH)
    output[: size - _VISIBLE] = 0.0  # never the likeliest
    writer.add_tensor("output.weight", output)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{prefix}{name}.weight", weights(WIDTH, WIDTH))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"{prefix}{name}.weight", weights(INNER, WIDTH))
        writer.add_tensor(f"{prefix}ffn_down.weight", weights(WIDTH, INNER))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_VISIBLE = 126 - 33 + 1


def _add_tokens(writer: gguf.GGUFWriter) -> int:
    """Add a vocabulary of bytes and printable characters; return its size."""
    kind = gguf.TokenType
    tokens: list[tuple[bytes, float, int]] = [
        (b"<unk>", 0.0, kind.UNKNOWN),
        (b"<s>", 0.0, kind.CONTROL),
        (b"</s>", 0.0, kind.CONTROL),
        *((f"<0x{byte:02X}>".encode(), 0.0, kind.BYTE) for byte in range(256)),
        ("\u2581".encode(), -1.0, kind.NORMAL),
        *((bytes([byte]), -float(byte), kind.NORMAL) for byte in range(33, 127)),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


if __name__ == "__main__":
    from pathlib import Path as _Path

    make(_Path(sys.argv[1]))
