"""The control routes of Dynamo's own worker for vLLM: each is here, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from dynamo_worker import EngineContext
from dynamo_worker.testing.peer_routes import PeerRoutes
from dynamo_worker_vllm.control import Control


class TestVllm(PeerRoutes):
    WORKER = "vLLM"

    @pytest.fixture
    def operations(self) -> set[str]:
        engine = MagicMock(enable_lora=True, lora_ref_cache={})
        context = EngineContext("test.backend", Path("/nowhere"), supervised=False)
        return set(Control(engine, context, ("tiny",)).routes())
