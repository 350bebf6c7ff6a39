"""Multimodal inputs: names only, so that servers can import them."""

from __future__ import annotations

from typing import Any


def create_input_processor(*_: Any, **__: Any) -> Any:
    """Refuse: the stand-in takes text and token ids only."""
    raise NotImplementedError("the stand-in takes text and token ids only")
