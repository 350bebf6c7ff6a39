"""What becomes of each field of a request: a parameter of the engine, or a refusal by name."""

from __future__ import annotations

from dynamo_worker.kit import fields
from dynamo_worker.kit.translation import RequestTable

#: Dynamo's fields keep their names (`temperature`, `max_tokens`, `stop_token_ids` …) unless a line below says
#: otherwise. The toy takes the likeliest token, so it need not look at those that only say how to sample. What it lacks
#: is refused, except for the value that asks for nothing: remove the lines of what your engine can do.
TABLE = RequestTable.of_engine(
    sampling={
        "n": ("", fields.unsupported(1)),
        "guided_decoding": ("", fields.unsupported({})),
        "presence_penalty": ("", fields.unsupported(0)),
        "frequency_penalty": ("", fields.unsupported(0)),
        "repetition_penalty": ("", fields.unsupported(1)),
    },
    stop={
        "max_tokens": ("max_tokens", fields.token_count),
        "min_tokens": ("min_tokens", fields.token_count),
        "max_thinking_tokens": ("", fields.unsupported(0)),
    },
    output={
        "logprobs": ("", fields.unsupported()),
        "prompt_logprobs": ("", fields.unsupported()),
    },
)
