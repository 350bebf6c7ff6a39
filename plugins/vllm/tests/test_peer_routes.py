"""The control routes of Dynamo's own worker for vLLM: each is here, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from dynamo_worker import EngineContext
from dynamo_worker.host.status.model_taints import ROUTE
from dynamo_worker.host.status.peer_routes import PEER_ROUTES
from dynamo_worker_vllm.control import Control

ROUTES = [route for route in PEER_ROUTES if "vLLM" in route.workers]


@pytest.fixture
def operations() -> set[str]:
    engine = MagicMock(enable_lora=True, lora_ref_cache={})
    return set(Control(engine, EngineContext("test.backend", Path("/nowhere"), supervised=False), ("tiny",)).routes())


@pytest.mark.parametrize("path", [route.path for route in ROUTES if not route.refused and route.path != ROUTE])
def test_a_route_that_is_not_refused_is_there(path: str, operations: set[str]) -> None:
    assert path.removeprefix("control/") in operations


@pytest.mark.parametrize("path", [route.path for route in ROUTES if route.refused])
def test_a_route_that_is_refused_is_not_there(path: str, operations: set[str]) -> None:
    assert path.removeprefix("control/") not in operations
