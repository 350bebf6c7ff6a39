"""The peer: its Rust `Worker` (`dynamo.common.backend`) driving a minimal Python engine.

Runs in the peer's environment (`common/peer_environment.py`). The engine does what the echo engine does: it cycles
through the prompt, one token per chunk, after one `await asyncio.sleep(…)` each.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from arguments import parse, visible
from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import EngineShutdown

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator

#: The engine's process: sends back every byte it gets. A step of the engine is one byte there and back.
_CHILD = "import os\nwhile data := os.read(0, 4096):\n    os.write(1, data)"


class MinimalEngine(LLMEngine):  # type: ignore[misc]
    """One token per chunk, as fast as the worker takes them or at a given rate.

    With a process tree, every token waits for a step of a child process. The death of the child and `cleanup()` end
    the requests in flight with the error that makes the frontend migrate them: the best that an engine can do here.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._interval = 1.0 / arguments.tokens_per_second if arguments.tokens_per_second else 0.0
        self._child: asyncio.subprocess.Process | None = None
        self._step: asyncio.Future[None] | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._ended = False

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[MinimalEngine, WorkerConfig]:  # noqa: ARG003
        """Read the command line."""
        arguments = parse("The peer's Worker around a minimal engine.")
        config = WorkerConfig(
            namespace=arguments.namespace,
            component=arguments.component,
            model_name=arguments.model_path,
            served_model_name=arguments.model_name,
            discovery_backend="file",
        )
        return cls(arguments), config

    async def start(self, worker_id: int) -> EngineConfig:  # noqa: ARG002 - the peer's interface
        """Start the child, if there shall be one."""
        if self._arguments.process_tree:
            pipe = asyncio.subprocess.PIPE
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _CHILD, stdin=pipe, stdout=pipe, start_new_session=True
            )
            self._step = asyncio.get_running_loop().create_future()
            self._stepping = asyncio.ensure_future(self._steps(self._child))
        return EngineConfig(
            model=self._arguments.model_path,
            served_model_name=self._arguments.model_name,
            llm=LlmRegistration(context_length=131072),
        )

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:  # noqa: ARG002
        """Yield the answer."""
        text = visible(request["token_ids"])
        length = len(text)
        last = (request["stop_conditions"].get("max_tokens") or 16) - 1
        interval = self._interval
        self._in_flight += 1
        try:
            for index in range(last):
                yield {"token_ids": [text[index % length]], "index": 0}
                if self._step is None:
                    await asyncio.sleep(interval)
                else:
                    await asyncio.shield(self._step)
                if self._ended:
                    raise EngineShutdown("the worker stops")
            yield {"token_ids": [text[last % length]], "index": 0, "finish_reason": "length"}
        finally:
            self._in_flight -= 1

    async def cleanup(self) -> None:
        """End the requests, then the child."""
        self._ended = True
        for _ in range(100):
            if not self._in_flight:
                break
            await asyncio.sleep(0.01)
        if self._stepping is not None:
            self._stepping.cancel()
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()

    async def _steps(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        assert self._step is not None
        while True:
            await asyncio.sleep(self._interval)
            if child.returncode is None:
                child.stdin.write(b"s")
            if not await child.stdout.read(1):
                self._step.set_exception(EngineShutdown("the engine's process is gone"))
                return
            step, self._step = self._step, asyncio.get_running_loop().create_future()
            step.set_result(None)


if __name__ == "__main__":
    run(MinimalEngine)
