"""Which conversation a request belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ConversationParams:
    """Identify the conversation, so that its turns can be kept on one attention-data-parallel rank."""

    conversation_id: str | None = None
