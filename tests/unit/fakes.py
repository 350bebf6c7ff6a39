"""What an engine gets from its worker, for tests of what engines are made of."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dynamo_worker import EngineContext
from dynamo_worker.allowed_paths import AllowedPaths


class FakeDiscovery:
    """Notes what it is told to do; ``refuses`` makes it fail."""

    def __init__(self, calls: list[str] | None = None) -> None:
        self.calls: list[str] = [] if calls is None else calls
        self.refuses = False
        self.present = True
        self.engine_out = False

    async def withdraw(self) -> None:
        self._note("withdraw")

    async def set_taints(self, taints: Collection[str]) -> None:
        self._note(f"taints {sorted(taints)}")

    async def rejoin(self) -> None:
        self._note("rejoin")

    async def leave(self) -> None:
        self._note("leave")
        self.present = False

    async def enter(self) -> None:
        self._note("enter")
        self.present = True

    async def register_adapter(self, name: str) -> None:
        self._note(f"register {name}")

    async def unregister_adapter(self, name: str) -> None:
        self._note(f"unregister {name}")

    def _note(self, call: str) -> None:
        if self.refuses:
            raise ConnectionError("discovery is gone")
        self.calls.append(call)


def fake_context(discovery: FakeDiscovery | None = None, *load_roots: str) -> EngineContext:
    """Return the surroundings of an engine that may load from below ``load_roots``."""
    return EngineContext(
        component="test.backend",
        private_dir=Path("/nowhere"),
        supervised=False,
        allowed_paths=AllowedPaths(load_roots),
        discovery=discovery or FakeDiscovery(),
    )
