"""The command line: how transformers loads the model, and the sizes of its batches by transformers' own names."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import StartError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

#: What the engine's process imports.
_PACKAGES: Final = ("torch", "transformers")
_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
#: The least tokens of a page that transformers takes.
_LEAST_PAGE: Final = 4
#: How the vectors of an input's tokens become one: their mean, the first token's, or the last one's.
POOLINGS: Final = ("mean", "cls", "last")
#: What only text generation has, and what only embeddings have, with the values that mean nothing.
_GENERATION: Final = {"enable_lora": False, "num_blocks": None, "max_memory_percent": None, "prefix_sharing": True}
_EMBEDDING: Final = {"pooling": None, "normalize": True, "matryoshka": False}
_FLAGS: Final = {"prefix_sharing": "--no-prefix-sharing", "normalize": "--no-normalize"}


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text!r}")
        return value

    return read


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0 up to 1, got {text!r}")
    return value


def add(parser: argparse.ArgumentParser) -> None:
    """Add all flags; transformers is not imported for that.

    :raises StartError: transformers is not installed.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise StartError(
                f"the transformers engine needs the Python package {package!r}, which is not installed",
                hint="pip install 'dynamo-worker-transformers[cuda]' (or [cpu])",
            )
    group = parser.add_argument_group("transformers engine: the model")
    group.add_argument("--model", required=True, help="directory, or name on the Hugging Face Hub")
    group.add_argument(
        "--served-model-name", nargs="+", help="names for clients, the main one first (default: --model)"
    )
    group.add_argument("--max-model-len", type=_at_least(2), help="longest sequence in tokens (default: the model's)")
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="type of the weights (default: as they are saved)"
    )
    group.add_argument("--device", help="PyTorch's name of the device (default: cuda if there is one, or else cpu)")
    group.add_argument("--attn-implementation", help="transformers' name of the attention (default: its own choice)")
    group.add_argument("--trust-remote-code", action="store_true", help="execute code that comes with the model")
    group.add_argument("--enable-lora", action="store_true", help="serve LoRA adapters (POST /engine/load_lora)")

    group = parser.add_argument_group("transformers engine: continuous batching")
    group.add_argument("--page-size", type=_at_least(_LEAST_PAGE), default=64, help="tokens per KV block (default: 64)")
    group.add_argument(
        "--num-blocks", type=_at_least(1),
        help="KV blocks (default: on a GPU what fits, on a CPU 8 contexts, at most 65,536 tokens or one context)",
    )  # fmt: skip
    group.add_argument(
        "--max-memory-percent", type=_fraction, help="part of the free memory for the KV cache, from 0 to 1"
    )
    group.add_argument(
        "--max-batch-tokens", type=_at_least(1), help="most tokens per step (default: 8192, on a CPU 512)"
    )
    group.add_argument("--max-requests-per-batch", type=_at_least(1), help="most requests per step")
    group.add_argument(
        "--no-prefix-sharing", dest="prefix_sharing", action="store_false",
        help="compute every prompt as a whole; --enable-lora does so as well",
    )  # fmt: skip
    group = parser.add_argument_group("transformers engine: embeddings")
    group.add_argument("--embedding", action="store_true", help="make embeddings instead of text (/v1/embeddings)")
    group.add_argument(
        "--pooling", choices=POOLINGS,
        help="how the tokens' vectors become that of the input (default: as the model's files for "
        "sentence-transformers say, otherwise mean)",
    )  # fmt: skip
    group.add_argument(
        "--no-normalize", dest="normalize", action="store_false",
        help="leave vectors as long as they are (default: as the same files say, otherwise length 1)",
    )  # fmt: skip
    group.add_argument(
        "--matryoshka", action="store_true",
        help="let clients ask for shorter vectors, although the model's config.json does not say that it can",
    )  # fmt: skip
    parser.set_defaults(publish_kv_events=False)


def check(args: argparse.Namespace) -> None:
    """Check that no flag is given that changes nothing.

    :raises UsageError: one is.
    """
    for name, nothing in (_GENERATION if args.embedding else _EMBEDDING).items():
        if getattr(args, name) != nothing:
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            what = "is not for embeddings" if args.embedding else "needs --embedding"
            raise UsageError(f"{flag} {what}", hint=f"leave {flag} out")


def embedding_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the process of an engine that makes embeddings needs to know."""
    names = (
        *("model", "max_model_len", "dtype", "device", "attn_implementation", "trust_remote_code"),
        *("max_batch_tokens", "max_requests_per_batch", "pooling", "normalize", "matryoshka"),
    )
    return {name: getattr(args, name) for name in names}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the engine's process needs to know."""
    names = (
        *("model", "max_model_len", "dtype", "device", "attn_implementation", "trust_remote_code", "enable_lora"),
        *("page_size", "num_blocks", "max_memory_percent", "max_batch_tokens", "max_requests_per_batch"),
        "prefix_sharing",
    )
    return {name: getattr(args, name) for name in names}
