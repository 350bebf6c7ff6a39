"""The engine's own process. It imports the engine; the worker does not."""

from __future__ import annotations

from typing import Any

from dynamo_worker.kit.child_loop import StepEngine
from dynamo_worker_acme.toy import Toy


class AcmeCore(StepEngine):
    """Takes requests from the worker between two steps of the engine, and sends the tokens of each step back."""

    def start(self, options: Any) -> None:
        """Load the engine."""
        self._engine = Toy(**options)

    def add(self, request_id: str, payload: Any) -> None:
        """Take a request."""
        self._engine.add(request_id, payload["prompt"], payload["parameters"])

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._engine.abort(request_id)

    def step(self) -> None:
        """Give every request its next token."""
        for request_id, (token, reason) in self._engine.step().items():
            self.send(request_id, [token, reason], last=reason is not None)

    def close(self) -> None:
        """Free what the engine holds, if it was loaded."""
        if hasattr(self, "_engine"):
            self._engine.close()
