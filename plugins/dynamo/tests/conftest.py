"""Dynamo's sample engine class, classes of our own that do what it does not, and a model that all of them serve."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_THE_WORKER

SAMPLE = "dynamo.common.backend.sample_engine:SampleLLMEngine"
#: What the sample engine ignores: it makes one answer, of its own tokens, and stops at none.
IGNORED = "n,guided_decoding,stop_token_ids,prompt_logprobs"
#: Tokens that are words; those of the 256 bytes follow.
WORDS = 3000
_HERE = str(Path(__file__).parent)

#: Rows that this engine has no part in: the sample engine is in the worker that is killed, and a class in a process of
#: its own dies in a drain as it does without one.
SHOWN_ELSEWHERE = OF_THE_WORKER | {"test_worker_killed_busy", "test_engine_process_killed_while_draining"}

# The classes of `engine_classes.py` are found by this process and by the workers that it starts.
sys.path.insert(0, _HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make those rows of the fault table slow that other engines show in every run, or one class for both."""
    for item in items:
        shown = item.path.name == "test_processes.py" and item.nodeid.partition("::")[2].startswith("TestFaults::")
        if item.name in SHOWN_ELSEWHERE or (shown and "engine_process" not in item.name):
            item.add_marker(pytest.mark.slow)


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level tokenizer."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a model whose tokens all have a text: the sample engine answers with 1, 2, 3 …"""
    directory = tmp_path_factory.mktemp("counting")
    vocabulary = {f"Ġw{number}": number for number in range(WORDS)}
    vocabulary |= {character: WORDS + byte for byte, character in enumerate(_byte_characters())}
    end = len(vocabulary)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "id": end,
                "content": "<|end|>",
                "special": True,
            }
        ],
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": end,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "eos_token_id": end,
    }
    settings = {
        "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "chat_template": "{{ messages[-1].content }}",
    }
    for name, content in (("tokenizer", tokenizer), ("config", config), ("tokenizer_config", settings)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def subject(model: Path) -> Subject:
    return sample(model)


def sample(model: Path, *flags: str, delay: float = 0.01, stream_tokens: int = 300) -> Subject:
    """Describe Dynamo's sample engine.

    :param flags: more of the class's own flags.
    :param delay: seconds for each token.
    """
    own = (
        "--refuse-fields",
        IGNORED,
        "--engine-class",
        SAMPLE,
        "--model-name",
        str(model),
        "--delay",
        str(delay),
        *flags,
    )
    return Subject("dynamo", own, model=str(model), stream_tokens=stream_tokens)
