"""Multimodal data: names only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class VideoData:
    """Frames of a video."""

    frames: list[Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    audio: Any = None
