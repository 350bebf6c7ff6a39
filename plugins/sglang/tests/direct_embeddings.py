"""SGLang alone: reads inputs, writes their embeddings; see :mod:`dynamo_worker.testing.embedding_serving`."""

from __future__ import annotations

import base64
import json
import struct
import sys

import sglang
import torch
from sglang.srt.managers.io_struct import EmbeddingReqInput


def main(model: str) -> None:
    flags = {"max_total_tokens": 16384, "max_running_requests": 16}
    if not torch.cuda.is_available():
        flags |= {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
        flags |= {"disable_overlap_schedule": True, "sleep_on_idle": True}
    engine = sglang.Engine(
        model_path=model, is_embedding=True, json_model_override_args='{"is_matryoshka": true}', **flags
    )

    async def embed() -> list[str]:
        vectors = []
        for given, dimensions in json.load(sys.stdin):
            name = "text" if isinstance(given, str) else "input_ids"
            request = EmbeddingReqInput(**{name: given}, dimensions=dimensions)
            output = await anext(engine.tokenizer_manager.generate_request(request, None))
            numbers = output["embedding"]
            vectors.append(base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode())
        return vectors

    vectors = engine.loop.run_until_complete(embed())
    engine.shutdown()
    print("\n" + json.dumps(vectors), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
