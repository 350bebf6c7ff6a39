"""Command-line arguments that the peer's worker and the bare handler share."""

from __future__ import annotations

import argparse


def parse(description: str) -> argparse.Namespace:
    """Parse the command line of a measured worker."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model-path", required=True, help="directory with config.json and the tokenizer")
    parser.add_argument("--model-name", required=True, help="name under which clients ask for the model")
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        default=0.0,
        help="rate of each request; 0: one token per turn of the event loop (default: %(default)s)",
    )
    parser.add_argument(
        "--process-tree",
        action="store_true",
        help="make the tokens in a child process in a session of its own (peer only)",
    )
    return parser.parse_args()


def visible(token_ids: list[int]) -> list[int]:
    """Return the tokens of a prompt that have a text; the special ones would be tokens that no client can count."""
    return [token for token in token_ids if token >= 3]
