"""A tiny model for images and text with fixed random weights. Requires torch, pillow and transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from dynamo_worker.testing.tiny_model import readable, trained_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

#: The token of an image in a prompt; engines put :data:`TOKENS` in its place.
IMAGE: Final = "<image>"
#: Takes texts and lists of parts.
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}assistant:"
)
_SIDE: Final = 32  # pixels of the square to which every image is scaled
_PATCH: Final = 8
#: Tokens of one image.
TOKENS: Final = (_SIDE // _PATCH) ** 2


def make(directory: Path, seed: int = 0) -> Path:
    """Write a model of the LLaVA family with its tokenizer and image processor (1 MB), and return the directory.

    :param seed: of the random weights.
    """
    import torch
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = trained_tokenizer((IMAGE,))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _SIDE,
            "patch_size": _PATCH,
            "projection_dim": 64,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for token in range(len(tokenizer)):
            if not readable(tokenizer.decode([token])):
                model.lm_head.weight[token] = 0
        # What is in an image changes the answer.
        model.model.multi_modal_projector.linear_2.weight.mul_(50)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.0, do_sample=True)
    model.save_pretrained(directory)
    _name_as_published(directory / "model.safetensors")
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": _PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": _SIDE},
        "crop_size": {"height": _SIDE, "width": _SIDE},
    }
    (directory / "processor_config.json").write_text(json.dumps(processor))
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


def _name_as_published(file: Path) -> None:
    """Give the weights of the vision tower the names in published models of this family, which engines look for."""
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    save_file(
        {name if name.startswith(new) else name.replace(old, new): weights[name] for name in weights},
        file,
        metadata={"format": "pt"},
    )
