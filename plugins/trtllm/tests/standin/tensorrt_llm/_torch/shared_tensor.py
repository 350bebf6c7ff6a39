"""Tensors shared between processes: the name only."""

from __future__ import annotations


class SharedTensorContainer:
    """A handle of a tensor; the stand-in has none."""
