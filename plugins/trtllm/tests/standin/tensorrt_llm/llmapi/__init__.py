"""The LLM API."""

from __future__ import annotations

from tensorrt_llm.conversation_params import ConversationParams
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.request import LoRARequest
from tensorrt_llm.executor.result import CompletionOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm import LLM, BaseLLM, MultimodalEncoder, PreprocessedInputs, RequestOutput
from tensorrt_llm.llmapi.llm_args import (
    AttentionDpConfig,
    BatchingType,
    CacheTransceiverConfig,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    CudaGraphConfig,
    DynamicBatchConfig,
    KvCacheConfig,
    KvCacheConnectorConfig,
    LlmArgs,
    LoraConfig,
    MoeConfig,
    PeftCacheConfig,
    SchedulerConfig,
    SleepConfig,
    TorchCompileConfig,
    TorchLlmArgs,
)
from tensorrt_llm.llmapi.llm_utils import KvCacheRetentionConfig
from tensorrt_llm.llmapi.mpi_session import MpiPoolSession, MpiSession
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

__all__ = [
    "LLM",
    "AttentionDpConfig",
    "BaseLLM",
    "BatchingType",
    "CacheTransceiverConfig",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "ContextChunkingPolicy",
    "ConversationParams",
    "CudaGraphConfig",
    "DisaggregatedParams",
    "DynamicBatchConfig",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "KvCacheConnectorConfig",
    "KvCacheRetentionConfig",
    "LlmArgs",
    "LoRARequest",
    "LoraConfig",
    "MoeConfig",
    "MpiPoolSession",
    "MpiSession",
    "MultimodalEncoder",
    "PeftCacheConfig",
    "PreprocessedInputs",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulingParams",
    "SleepConfig",
    "TorchCompileConfig",
    "TorchLlmArgs",
]
