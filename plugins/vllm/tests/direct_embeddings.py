"""vLLM alone: reads inputs, writes their embeddings; see :mod:`dynamo_worker.testing.embedding_serving`."""

from __future__ import annotations

import asyncio
import base64
import json
import sys

from vllm import PoolingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM


async def main(model: str) -> None:
    args = AsyncEngineArgs(
        model=model,
        runner="pooling",
        enforce_eager=True,
        max_model_len=2048,
        dtype="float32",
        hf_overrides={"is_matryoshka": True},
    )
    llm = AsyncLLM.from_engine_args(args)
    vectors = []
    for number, (given, dimensions) in enumerate(json.load(sys.stdin)):
        prompt = given if isinstance(given, str) else {"prompt_token_ids": given}
        async for output in llm.encode(prompt, PoolingParams(task="embed", dimensions=dimensions), str(number)):
            vectors.append(base64.b64encode(output.outputs.data.numpy().astype("<f4").tobytes()).decode())
    llm.shutdown()
    print("\n" + json.dumps(vectors), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
