"""Loading of multimodal data: names only."""

from __future__ import annotations

from typing import Any


async def async_load_video(*_: Any, **__: Any) -> Any:
    """Refuse: the stand-in takes text and token ids only."""
    raise NotImplementedError("the stand-in takes text and token ids only")
