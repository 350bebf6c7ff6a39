"""How requests are routed to workers: the values of ``--router-mode``."""

from __future__ import annotations

from typing import Final

#: The member of ``dynamo.llm.RouterMode`` for each value.
ROUTER_MODES: Final = {
    "round-robin": "RoundRobin",
    "random": "Random",
    "kv": "KV",
    "least-loaded": "LeastLoaded",
}
