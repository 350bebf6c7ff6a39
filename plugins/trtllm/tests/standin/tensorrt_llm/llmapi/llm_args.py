"""Arguments of the engine: names, types and defaults of the real package; extra keys are refused.

Configurations of features that the stand-in has no trace of (speculation, sparse attention, mixture of experts, …)
accept any keys, as `OpenConfig`.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

TOKENIZER_ALIASES = {
    "deepseek_v32": "tensorrt_llm.tokenizer.deepseek_v32.DeepseekV32Tokenizer",
    "glm_moe_dsa": "tensorrt_llm.tokenizer.glm_moe_dsa.GlmMoeDsaTokenizer",
}

AllReduceStrategy = Literal[
    "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"
]

# Removed arguments that are still accepted and ignored.
TORCH_LLMARGS_REMOVED_ARGS = frozenset({"sampler_type"})


class StrEnum(str, Enum):
    """A string that is one of a few."""

    def __str__(self) -> str:
        return str(self.value)


class StrictBaseModel(BaseModel):
    """Refuse keys that are not fields."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class OpenConfig(BaseModel):
    """Accept any keys: the configuration of a feature that the stand-in does not imitate."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class BatchingType(StrEnum):
    """How requests are batched."""

    STATIC = "STATIC"
    INFLIGHT = "INFLIGHT"


class CapacitySchedulerPolicy(StrEnum):
    """What the scheduler does when the KV cache runs full."""

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(StrEnum):
    """How long prompts are cut."""

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"
    FORCE_CHUNK = "FORCE_CHUNK"


class WaitingQueuePolicy(StrEnum):
    """Order of the waiting requests."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class LoadFormat(Enum):
    """Where the weights come from."""

    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2
    GMS = 3


class DynamicBatchConfig(StrictBaseModel):
    """Tuning of the batch size at run time."""

    enable_batch_size_tuning: bool = True
    enable_max_num_tokens_tuning: bool = False
    dynamic_batch_moving_average_window: int = 128


class SchedulerConfig(StrictBaseModel):
    """Scheduling of requests."""

    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: ContextChunkingPolicy | None = None
    dynamic_batch_config: DynamicBatchConfig | None = None
    waiting_queue_policy: WaitingQueuePolicy = WaitingQueuePolicy.FCFS
    use_python_scheduler: bool = False
    enable_prefix_aware_scheduling: bool = True


class PeftCacheConfig(StrictBaseModel):
    """Cache of adapter weights."""

    num_host_module_layer: int = 0
    num_device_module_layer: int = 0
    optimal_adapter_size: int = 8
    max_adapter_size: int = 64
    num_put_workers: int = 1
    num_ensure_workers: int = 1
    num_copy_streams: int = 1
    max_pages_per_block_host: int = 24
    max_pages_per_block_device: int = 8
    device_cache_percent: float = 0.02
    host_cache_size: int = 1024**3
    lora_prefetch_dir: str | None = None


class LoraConfig(StrictBaseModel):
    """LoRA adapters."""

    lora_dir: list[str] = Field(default_factory=list)
    lora_ckpt_source: Literal["hf", "nemo"] = "hf"
    max_lora_rank: int = 64
    lora_target_modules: list[str] = Field(default_factory=list)
    trtllm_modules_to_hf_modules: dict[str, str | list[str]] = Field(default_factory=dict)
    max_loras: int | None = None
    max_cpu_loras: int | None = None
    swap_gate_up_proj_lora_b_weight: bool = True
    cuda_graph_specialize_lora: bool = False


class KVEventsConfig(StrictBaseModel):
    """KV events that each rank publishes itself."""

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None
    endpoint: str = Field("tcp://*:5557", min_length=1)
    replay_endpoint: str | None = Field(None, min_length=1)
    buffer_steps: int = Field(10_000, gt=0)
    hwm: int = Field(100_000, gt=0)
    max_queue_size: int = Field(100_000, gt=0)
    topic: str = ""


class BlockReuseConfig(StrictBaseModel):
    """Which blocks are reused, by the second KV-cache manager."""

    policy: Literal["all_reusable", "per_request", "per_conversation"] = "all_reusable"
    max_num_turns: PositiveInt = 1


class MambaStateConfig(StrictBaseModel):
    """Snapshots of recurrent states."""

    periodic_snapshot_interval: NonNegativeInt = 0
    additional_snapshot_offsets_from_start: list[PositiveInt] = Field(default_factory=list)
    additional_snapshot_offsets_from_end: list[NonNegativeInt] = Field(default_factory=list)
    enable_branch_snapshot: bool = False


class KvCacheConfig(StrictBaseModel):
    """The KV cache."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = Field(None, min_length=1)
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = Field(0.9, ge=0, le=1)
    host_cache_size: int | None = None
    disk_cache_size: NonNegativeInt | None = None
    disk_cache_path: str | None = None
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    attention_dp_events_gather_period_ms: int = 5
    kv_events_config: KVEventsConfig | None = None
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    max_gpu_total_bytes: NonNegativeInt = 0
    iteration_stats_interval: PositiveInt = 1
    dtype: str = "auto"
    mamba_ssm_cache_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    mamba_ssm_stochastic_rounding: bool = False
    mamba_ssm_philox_rounds: int = Field(10, ge=1)
    tokens_per_block: int = 32
    mamba_state_cache_interval: NonNegativeInt | None = None
    mamba_state_config: MambaStateConfig = Field(default_factory=MambaStateConfig)
    use_kv_cache_manager_v2: bool | Literal["auto"] = "auto"
    enable_swa_scratch_reuse: bool = False
    kv_cache_event_hash_algo: Literal["auto", "v1_block_key", "v2_sha256", "v2_sha256_64"] = "auto"
    max_util_for_resume: float = Field(0.95, gt=0, le=1)
    enable_kv_pool_rebalance: bool = False
    kv_pool_rebalance_min_sampled_kv_caches: int = Field(2000, ge=0)
    kv_pool_rebalance_cooldown_secs: float = Field(120.0, ge=0)
    kv_pool_rebalance_target_ratio_update_interval: int = Field(100, gt=0)
    kv_pool_rebalance_ratio_threshold: float = Field(1.25, gt=1.0)
    kv_pool_rebalance_moving_average_decay: float = Field(0.9999, gt=0, lt=1)
    kv_pool_rebalance_check_interval: int = Field(10, gt=0)
    disk_prefetch_num_reqs: int = Field(0, ge=0)
    fp8_context_mla_kv_len_cap: int | None = None
    pool_ratio: list[float] | None = Field(None, min_length=1)
    avg_seq_len: PositiveInt | None = None
    block_reuse_config: BlockReuseConfig = Field(default_factory=BlockReuseConfig)


class CacheTransceiverConfig(StrictBaseModel):
    """Transfer of KV blocks between engines."""

    backend: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"] | None = None
    transceiver_runtime: Literal["CPP", "PYTHON", "auto"] | None = "auto"
    max_tokens_in_buffer: int | None = None
    kv_transfer_timeout_ms: PositiveInt | None = 60000
    kv_transfer_sender_future_timeout_ms: PositiveInt | None = 1000
    kv_transfer_poll_interval_ms: PositiveInt | None = 5000
    kv_cache_bounce_size_mb: int = Field(0, ge=0)
    enable_pipelined_transfer: bool = False


class KvCacheConnectorConfig(StrictBaseModel):
    """An external KV cache."""

    connector: str | None = None
    connector_module: str | None = None
    connector_scheduler_class: str | None = None
    connector_worker_class: str | None = None


class AttentionDpConfig(OpenConfig):
    """Load balancing between attention-data-parallel ranks."""

    enable_balance: bool = False
    timeout_iters: int = 50
    batching_wait_iters: int = 10
    enable_kv_cache_aware_routing: bool = False
    kv_cache_routing_load_balance_weight: float = 1.0
    kv_cache_routing_conversation_affinity: bool = False


class CudaGraphConfig(StrictBaseModel):
    """CUDA graphs."""

    mode: Literal["decode", "encode"] = "decode"
    batch_sizes: list[int] | None = None
    max_batch_size: NonNegativeInt = 0
    enable_padding: bool = False
    num_tokens: list[PositiveInt] | None = None
    max_num_token: NonNegativeInt = 0
    seq_lens: list[PositiveInt] | None = None
    max_seq_len: NonNegativeInt = 0


class TorchCompileConfig(StrictBaseModel):
    """torch.compile."""

    enable_fullgraph: bool = True
    enable_inductor: bool = False
    enable_piecewise_cuda_graph: bool = False
    capture_num_tokens: list[PositiveInt] | None = None
    enable_userbuffers: bool = True
    max_num_streams: PositiveInt = 3


class SleepConfig(OpenConfig):
    """Sleep and wake-up."""

    restore_modes: dict[str, Any] = Field(default_factory=dict)


class MoeConfig(OpenConfig):
    """Mixture of experts."""

    backend: str = "AUTO"
    max_num_tokens: int | None = None
    load_balancer: Any | None = None
    disable_finalize_fusion: bool = False
    use_low_precision_moe_combine: bool = False


class DwdpConfig(StrictBaseModel):
    """Distributed weight data parallelism."""

    dwdp_size: int = 1
    num_groups: int = 1
    num_experts_per_worker: int = 0
    num_prefetch_experts: int = 0
    contention_opt: bool = False


class ModelExpressConfig(StrictBaseModel):
    """Weights from a peer."""

    server_url: str | None = None
    server_query_timeout_s: NonNegativeInt | None = None
    preshard_strategy: Literal["per_module"] = "per_module"


class GmsConfig(StrictBaseModel):
    """Weights in a shared GPU memory pool."""

    socket_path: str | None = None
    mode: Literal["auto", "rw", "ro"] = "auto"
    tag: str = Field("weights", min_length=1)


class AgentTreeConfig(StrictBaseModel):
    """Scheduling of agents."""

    agent_percentage: float = 0.0
    agent_types: list[str] | None = None
    agent_inflight_seq_num: int = 2**31 - 1


class ReorderRequestPolicyConfig(StrictBaseModel):
    """Reordering of requests."""

    policy_name: Literal["AgentTree"] | None = None
    policy_args: AgentTreeConfig = Field(default_factory=AgentTreeConfig)


class BaseLlmArgs(StrictBaseModel):
    """What all backends have in common."""

    model: str | Path
    tokenizer: Any | None = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    custom_tokenizer: str | None = None
    post_processor_hook: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    model_kwargs: dict[str, Any] | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = Field(None, validate_default=True)
    moe_cluster_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    enable_lm_head_tp_in_adp: bool = False
    pp_partition: list[int] | None = None
    cp_config: OpenConfig | None = None
    load_format: Any = "auto"
    enable_lora: bool = False
    lora_config: LoraConfig | None = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    batched_logits_processor: object | None = None
    iter_stats_max_iterations: int | None = Field(None, ge=-1)
    request_stats_max_iterations: int | None = Field(None, ge=-1)
    peft_cache_config: PeftCacheConfig | None = None
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    cache_transceiver_config: CacheTransceiverConfig | None = None
    sparse_attention_config: OpenConfig | None = None
    kv_cache_compression_config: OpenConfig | None = None
    speculative_config: OpenConfig | None = None
    max_batch_size: int | None = 2048
    max_input_len: int | None = 1024
    max_seq_len: int | None = None
    max_beam_width: int | None = 1
    max_num_tokens: int | None = 8192
    gather_generation_logits: bool = False
    num_postprocess_workers: int = 0
    postprocess_tokenizer_dir: str | None = None
    num_serve_frontends: int = Field(1, ge=1, le=64)
    reasoning_parser: str | None = None
    decoding_config: object | None = None
    mpi_session: object | None = Field(None, exclude=True, alias="_mpi_session")
    otlp_traces_endpoint: str | None = None
    backend: str | None = None
    return_perf_metrics: bool = False
    perf_metrics_output_dir: str | None = None
    perf_metrics_max_requests: NonNegativeInt = 0
    prometheus_metrics_config: OpenConfig | None = None
    enable_energy_metrics: bool = False
    orchestrator_type: Literal["rpc", "ray"] | None = None
    env_overrides: dict[str, str] | None = None
    telemetry_config: OpenConfig = Field(default_factory=OpenConfig)

    @classmethod
    def from_yaml(cls, yaml_path: str | Path) -> Any:
        """Read the arguments from a YAML file."""
        config = yaml.safe_load(Path(yaml_path).read_text()) or {}
        if not isinstance(config, dict):
            raise ValueError(f"{yaml_path}: expected a mapping at the top, got {type(config).__name__}")
        return cls(**config)

    @field_validator("env_overrides", mode="before")
    @classmethod
    def _env_as_strings(cls, value: Any) -> Any:
        return value if value is None else {str(key): str(entry) for key, entry in value.items()}

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _count_gpus(cls, value: Any) -> Any:
        return visible_gpus() if value is None else value

    @model_validator(mode="after")
    def _defaults_for_none(self) -> Any:
        for name in ("max_batch_size", "max_input_len", "max_beam_width", "max_num_tokens"):
            if getattr(self, name) is None:
                setattr(self, name, type(self).model_fields[name].default)
        for name in ("moe_cluster_parallel_size", "moe_tensor_parallel_size", "moe_expert_parallel_size"):
            if getattr(self, name) is None:
                setattr(self, name, -1)
        if self.skip_tokenizer_init:
            self.tokenizer = None
        return self

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    def get_runtime_sizes(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Return max_beam_width, max_num_tokens, max_seq_len and max_batch_size."""
        return self.max_beam_width, self.max_num_tokens, self.max_seq_len, self.max_batch_size


class TorchLlmArgs(BaseLlmArgs):
    """Arguments of the PyTorch backend."""

    generation_config: Literal["auto", "trtllm"] = "trtllm"
    garbage_collection_gen0_threshold: int = 20000
    cuda_graph_config: CudaGraphConfig | None = Field(default_factory=CudaGraphConfig)
    encoder_cuda_graph_config: CudaGraphConfig | None = None
    enable_encoder_decoder_mixed_cuda_graph: bool = True
    multimodal_config: OpenConfig | None = Field(default_factory=OpenConfig)
    attention_dp_config: AttentionDpConfig | None = None
    disable_overlap_scheduler: bool = False
    moe_config: MoeConfig = Field(default_factory=MoeConfig)
    nvfp4_gemm_config: OpenConfig = Field(default_factory=OpenConfig)
    dwdp_config: DwdpConfig | None = None
    encoder_max_batch_size: PositiveInt | None = None
    encoder_max_num_tokens: PositiveInt | None = None
    attn_backend: str = "TRTLLM"
    enable_mla_skip_correction: bool = False
    mla_skip_correction_threshold: float = Field(8.0, gt=0.0, le=32.0)
    sampler_force_async_worker: bool = False
    enable_in_graph_sampling: bool = False
    enable_speculative_beam_history_d2h: bool = False
    enable_early_first_token_response: bool = False
    enable_low_latency_host_dispatch: bool = False
    enable_iter_perf_stats: bool = False
    enable_iter_req_stats: bool = False
    print_iter_log: bool = False
    batch_wait_timeout_ms: NonNegativeFloat = 0
    batch_wait_timeout_iters: NonNegativeInt = 0
    batch_wait_max_tokens_ratio: float = Field(0, ge=0, le=1)
    torch_compile_config: TorchCompileConfig | None = None
    prefill_cuda_graph_backend: Literal["disabled", "piecewise", "breakable"] = "disabled"
    prefill_capture_num_tokens: list[int] | None = None
    enable_autotuner: bool = True
    use_fine_grained_sync: bool = False
    enable_layerwise_nvtx_marker: bool = False
    load_format: str | LoadFormat = LoadFormat.AUTO
    enable_min_latency: bool = False
    stream_interval: PositiveInt = 1
    force_dynamic_quantization: bool = False
    allreduce_strategy: AllReduceStrategy | None = "AUTO"
    checkpoint_loader: object | None = None
    checkpoint_format: str | None = None
    checkpoint_io_policy: Literal["auto", "native", "rank_striped_read_ahead"] = "auto"
    mx_config: ModelExpressConfig = Field(default_factory=ModelExpressConfig)
    gms_config: GmsConfig = Field(default_factory=GmsConfig)
    kv_connector_config: KvCacheConnectorConfig | None = None
    mm_encoder_only: bool = False
    disable_mm_encoder: bool = False
    encode_only: bool = False
    ray_worker_extension_cls: str | None = None
    ray_placement_config: OpenConfig | None = Field(None, exclude=True)
    ray_worker_nsight_options: dict[str, str] | None = None
    sleep_config: SleepConfig | None = None
    reorder_policy_config: ReorderRequestPolicyConfig | None = None
    enable_resource_governor: bool = False
    use_cute_dsl_blockscaling_mm: bool = False
    use_cute_dsl_blockscaling_bmm: bool = False
    use_cute_dsl_bf16_bmm: bool = False
    use_cute_dsl_bf16_gemm: bool = False
    max_stats_len: int = Field(1000, ge=-1)
    layer_wise_benchmarks_config: OpenConfig = Field(default_factory=OpenConfig)
    backend: Literal["pytorch"] = "pytorch"

    _extra_resource_managers: dict[str, object] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _drop_removed(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("sampler_type", "auto") not in ("auto", "TorchSampler"):
            raise ValueError(f"sampler_type: expected 'auto' or 'TorchSampler', got {data['sampler_type']!r}")
        return {key: value for key, value in data.items() if key not in TORCH_LLMARGS_REMOVED_ARGS}

    @field_validator("max_stats_len")
    @classmethod
    def _keep_one_entry(cls, value: int) -> int:
        return value if value == -1 else max(value, 1)

    @field_validator("load_format", mode="before")
    @classmethod
    def _load_format_by_name(cls, value: Any) -> Any:
        if isinstance(value, LoadFormat):
            return value
        if isinstance(value, str) and value.upper() in LoadFormat.__members__:
            return LoadFormat[value.upper()]
        if isinstance(value, int) and not isinstance(value, bool):
            return LoadFormat(value)
        raise ValueError(f"load_format: expected one of {', '.join(LoadFormat.__members__)}, got {value!r}")


LlmArgs = TorchLlmArgs


def visible_gpus() -> int:
    """Return how many GPUs the stand-in pretends to have: TLLM_STANDIN_GPUS (8)."""
    return int(os.environ.get("TLLM_STANDIN_GPUS", "8"))
