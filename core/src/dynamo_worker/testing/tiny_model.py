"""Tiny models with fixed random weights, for engines that need a real one. Requires torch and transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make(directory: Path, seed: int = 0) -> Path:
    """Write the model and its tokenizer (600 kB), and return the directory.

    :param seed: of the random weights; another seed makes another model with the same tokenizer.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog. "] * 20,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        # Exactly the tokenizer's tokens: every token has text.
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for token in range(len(wrapped)):
            if not _readable(wrapped.decode([token])):
                model.lm_head.weight[token] = 0
    # Greedy by default, which avoids the tokens whose weights are zero: unreadable ones and the end of the text.
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.0, do_sample=True)
    model.save_pretrained(directory)
    return directory


def make_embedding(directory: Path, *, pooling: str = "mean", normalize: bool = True, seed: int = 0) -> Path:
    """Write a BERT that makes embeddings with 64 dimensions, with the files for sentence-transformers.

    :param pooling: ``mean``, ``cls``, ``lasttoken`` or ``max``, as sentence-transformers names them.
    :param normalize: whether the list of modules ends with one that gives vectors the length 1.
    :param seed: of the random weights.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=special[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=256,
        special_tokens=special,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The quick brown fox jumps over the lazy dog. "] * 20, trainer)
    ends = [(name, special.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    wrapped.save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.5,  # otherwise all vectors are nearly the same
    )
    BertModel(config).save_pretrained(directory)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    switches = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    chosen = {f"pooling_mode_{name}": name.partition("_")[0] == pooling for name in switches}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **chosen}))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    return directory


def make_adapter(directory: Path) -> Path:
    """Write a LoRA adapter that changes every answer of the model, and return the directory."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 64)
            tensors[f"{name}.lora_B.weight"] = torch.randn(64, 8)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return directory


def _readable(text: str) -> bool:
    """Return whether a token is visible text: not a special token, and not part of a character."""
    return text.isascii() and text.isprintable() and text.strip() != "" and not text.startswith("<|")
