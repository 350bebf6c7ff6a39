"""llama.cpp behind the server engine keeps what every engine has to keep."""

from __future__ import annotations

from dynamo_worker.testing.conformance import EngineConformance


class TestLlamaCpp(EngineConformance):
    def test_an_unknown_field_of_the_body_is_refused_by_name(self) -> None:
        """Requests are the server's to read: vLLM warns of such a field, llama.cpp ignores it."""
