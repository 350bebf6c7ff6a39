"""A CPU stand-in of TensorRT-LLM: real processes, sockets and deaths, made-up tokens.

Importing it starts Open MPI, and with it `orted`, as the real package does.
"""

from __future__ import annotations

from tensorrt_llm._mpi import prepare_environment

__version__ = "1.3.0rc29+standin"

prepare_environment()

from mpi4py import MPI as _MPI  # noqa: E402, F401 - the import is what starts orted
from tensorrt_llm.conversation_params import ConversationParams  # noqa: E402
from tensorrt_llm.disaggregated_params import DisaggregatedParams  # noqa: E402
from tensorrt_llm.llmapi.llm import LLM, MultimodalEncoder, RequestOutput  # noqa: E402
from tensorrt_llm.llmapi.llm_args import LlmArgs, TorchLlmArgs  # noqa: E402
from tensorrt_llm.sampling_params import SamplingParams  # noqa: E402
from tensorrt_llm.scheduling_params import SchedulingParams  # noqa: E402

__all__ = [
    "LLM",
    "ConversationParams",
    "DisaggregatedParams",
    "LlmArgs",
    "MultimodalEncoder",
    "RequestOutput",
    "SamplingParams",
    "SchedulingParams",
    "TorchLlmArgs",
]
