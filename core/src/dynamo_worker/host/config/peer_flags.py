"""Every flag of Dynamo's own workers, ``python -m dynamo.vllm`` and the like, and what becomes of it here.

The engine's own flags are not among them. Messages and documentation come from this table. Standard library only, as
:mod:`dynamo_worker.host.config.options`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The engines that Dynamo has workers for, by the names of their plugins, and the prefixes of their variables.
ENGINES: Final = {"vllm": "DYN_VLLM_", "sglang": "DYN_SGL_", "trtllm": "DYN_TRTLLM_"}
_VLLM, _SGLANG, _TRTLLM = ENGINES

Verdict = Literal["honoured", "ignored", "refused"]


@dataclass(frozen=True)
class PeerFlag:
    """One flag of Dynamo's own workers.

    :param flag: its name.
    :param verdict: ``honoured``: it means the same here; ``ignored``: accepted, as it changes nothing for a text
        worker; ``refused``: an error that names it.
    :param text: completes "FLAG is not supported: "; of other flags, a remark for the documentation.
    :param engines: the workers that have it; all if empty.
    :param env: its environment variable; empty if it has none, or if frontends read it as well.
    :param switch: whether it takes no value, and can be negated as ``--no-NAME``.
    :param many: whether it takes any number of values.
    :param aliases: its other names.
    :param harmless: values of a refused flag that ask for nothing.
    :param refuses: values of an honoured flag that are refused; each completes "FLAG VALUE is not supported: ".
    """

    flag: str
    verdict: Verdict
    text: str = ""
    engines: tuple[str, ...] = ()
    env: str = ""
    switch: bool = False
    many: bool = False
    aliases: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings, including those that turn a switch off."""
        names = (self.flag, *self.aliases)
        return (*names, *(f"--no-{name[2:]}" for name in names)) if self.switch else names


def _honoured(flags: str, *engines: str, text: str = "", env: str = "", switch: bool = False) -> list[PeerFlag]:
    return [PeerFlag(flag, "honoured", text, engines, env, switch) for flag in flags.split()]


def _rows(verdict: Verdict, flags: str, text: str, *engines: str, switch: bool = False) -> list[PeerFlag]:
    """Return rows for several flags of one kind; their variables follow the usual pattern."""
    prefix = ENGINES[engines[0]] if len(engines) == 1 else "DYN_"
    return [
        PeerFlag(flag, verdict, text, engines, prefix + flag[2:].replace("-", "_").upper(), switch)
        for flag in flags.split()
    ]


_OTHER_WORKER: Final = "this worker serves text generation and embeddings only; use Dynamo's own worker for {}"
_IMAGES: Final = _OTHER_WORKER.format("images, audio and video")
_DECODING: Final = "this worker loads and decodes images itself, and reads none over NIXL; leave it out"
_ENCODERS: Final = "this worker encodes the images of its requests itself; leave it out, and start no encode worker"
_OWN_ENCODER: Final = "images go through the encoder of the model; leave it out, or use Dynamo's own worker"
_ACCEPTS_IMAGES: Final = "images; requests with video or audio are refused"
_TOKENIZER: Final = "with `--embedding-worker` only: otherwise the frontend tokenizes"
_DIFFUSION: Final = _OTHER_WORKER.format("images and videos that a model makes")
_ENCODE: Final = {
    "encode": "this worker serves text generation and embeddings only; use Dynamo's own worker for encoders"
}
_ENCODE_VLLM: Final = {
    "encode": "workers here encode the images of their requests themselves; start no encode worker, and leave "
    "--route-to-encoder out"
}
_GMS: Final = {"gms": "this worker does not use Dynamo's GPU memory service; leave --load-format out, or use `auto`"}
_ROUTER: Final = "a worker here advertises no routing of its own; give it to the frontend"
_ONLY_MEDIA: Final = "concerns images, audio and video only"
_ONLY_ENCODERS: Final = "concerns encode workers only"
_ONLY_BENCHMARK: Final = "concerns --benchmark-mode only"
_FPM: Final = "with the metrics of forward passes"
_MODES: Final = "`agg` (also `pd`), `prefill` and `decode`; `encode` is refused"

#: Flags that all workers have.
_RUNTIME: Final = [
    *_honoured("--version"),
    *_honoured("--namespace", text="with `DYN_NAMESPACE_WORKER_SUFFIX`", env="DYN_NAMESPACE"),
    *_honoured("--endpoint --kv-state-endpoint --discovery-backend --request-plane --response-plane --event-plane"),
    *_honoured("--dyn-tool-call-parser --dyn-reasoning-parser --dyn-default-thinking-mode"),
    *_honoured("--exclude-tools-when-tool-choice-none --dyn-enable-structural-tag", switch=True),
    *_honoured("--dyn-structural-tag --dyn-structural-tag-scope --dyn-structural-tag-schema --custom-jinja-template"),
    PeerFlag("--endpoint-types", "honoured", "also `none`", aliases=("--dyn-endpoint-types",)),
    *_honoured("--dump-config-to", text="as YAML, without secrets"),
    *_honoured("--fpm-trace", text=_FPM, switch=True),
    *_honoured("--engine-request-limit --tcp-tls-cert-path --tcp-tls-key-path --tcp-tls-ca-cert-path"),
    *_honoured("--tcp-tls-insecure --nats-tls-insecure", switch=True),
    *_honoured("--tcp-tls-server-name --tcp-tls-handshake-timeout --tcp-tls-client-cert-path"),
    *_honoured("--tcp-tls-client-key-path --tcp-tls-client-ca-cert-path --nats-tls-ca-cert-path"),
    *_honoured("--nats-tls-client-cert-path --nats-tls-client-key-path"),
    PeerFlag(
        "--connector",
        "refused",
        "name the connector in --kv-transfer-config",
        (_VLLM,),
        "DYN_CONNECTOR",
        many=True,
        harmless=("none", "null"),
    ),
    PeerFlag(
        "--connector",
        "refused",
        "name the connector in `kv_connector_config` of --extra-engine-args",
        (_TRTLLM,),
        "DYN_CONNECTOR",
        many=True,
        harmless=("none", "null"),
    ),
    PeerFlag("--connector", "ignored", "Dynamo's worker ignores it as well", (_SGLANG,), many=True),
    PeerFlag(
        "--output-modalities",
        "refused",
        _DIFFUSION,
        env="DYN_OUTPUT_MODALITIES",
        many=True,
        harmless=("text",),
    ),
    *_rows("ignored", "--media-output-fs-url --media-output-http-url", _ONLY_MEDIA),
    *_rows("ignored", "--multimodal-embedding-cache-capacity-gb", _ONLY_ENCODERS),
    *_rows("ignored", "--multimodal-embedding-cache-publisher", _ONLY_ENCODERS, switch=True),
    *_rows("ignored", "--health-check-payload", "the canary is the worker's own; see `--stall-timeout`"),
]

#: Flags of a router, which a worker of Dynamo writes into its model card. Frontends read the same variables.
_ROUTING: Final = [
    PeerFlag(
        "--router-mode",
        "honoured",
        "written into the model card, and for the frontend of `--frontend`",
    ),
    *(
        PeerFlag(flag, "refused", _ROUTER)
        for flag in (
            *("--router-session-affinity-ttl-secs", "--router-session-affinity-mode"),
            *("--active-decode-blocks-threshold", "--active-prefill-tokens-threshold"),
            *("--active-prefill-tokens-threshold-frac", "--router-kv-overlap-score-credit"),
            *("--router-kv-overlap-score-credit-decay", "--router-prefill-load-scale"),
            *("--router-decode-active-request-weight", "--router-host-cache-hit-weight"),
            *("--router-disk-cache-hit-weight", "--router-temperature", "--router-tracking-hash"),
            *("--router-tracking-key-file", "--router-tracking-key-id", "--router-prefill-load-model"),
            *("--router-ttl-secs", "--router-approximate-cache-policy", "--router-queue-threshold"),
            *("--router-policy-config", "--router-conditional-disagg-config", "--router-prefill-policy"),
            *("--router-decode-policy", "--router-event-threads", "--router-queue-policy"),
            *("--shared-cache-multiplier", "--shared-cache-type", "--router-predicted-ttl-secs"),
        )
    ),
    PeerFlag("--router-kv-overlap-score-weight", "refused", _ROUTER, aliases=("--kv-overlap-score-weight",)),
    PeerFlag("--router-kv-events", "refused", _ROUTER, switch=True, aliases=("--kv-events",)),
    *(
        PeerFlag(f"--router-{name}", "refused", _ROUTER, switch=True, aliases=(f"--{name}",))
        for name in ("track-active-blocks", "track-output-blocks", "assume-kv-reuse")
    ),
    *(
        PeerFlag(flag, "refused", _ROUTER, switch=True)
        for flag in (
            *("--load-aware", "--router-replica-sync", "--router-track-prefill-tokens"),
            *("--router-conditional-disagg", "--use-remote-indexer", "--enable-session-prefix-index"),
        )
    ),
]

_OF_VLLM: Final = [
    PeerFlag(
        "--disaggregation-mode", "honoured", _MODES, (_VLLM,), "DYN_VLLM_DISAGGREGATION_MODE", refuses=_ENCODE_VLLM
    ),
    PeerFlag("--headless", "honoured", "", (_VLLM,), "DYN_VLLM_HEADLESS", switch=True),
    *_honoured("--enable-rl", _VLLM, text="with the routes for weights", env="DYN_ENABLE_RL", switch=True),
    PeerFlag("--load-format", "honoured", "`gms` is refused", (_VLLM,), refuses=_GMS),
    PeerFlag("--use-vllm-tokenizer", "honoured", _TOKENIZER, (_VLLM,), "DYN_VLLM_USE_TOKENIZER", switch=True),
    *_rows("honoured", "--enable-multimodal", _ACCEPTS_IMAGES, _VLLM, switch=True),
    *_rows("refused", "--route-to-encoder", _ENCODERS, _VLLM, switch=True),
    *_rows("refused", "--frontend-decoding", _DECODING, _VLLM, switch=True),
    PeerFlag("--custom-encoder-class", "refused", _OWN_ENCODER, (_VLLM,), "DYN_CUSTOM_ENCODER_CLASS"),
    *_rows("ignored", "--mm-prompt-template --embedding-transfer-mode", _ONLY_ENCODERS, _VLLM),
    *_rows("honoured", "--embedding-worker", "implies `--runner pooling`", _VLLM, switch=True),
    *_rows("honoured", "--embedding-frontend-tokenization", "", _VLLM, switch=True),
    PeerFlag(
        "--embedding-worker-processes",
        "refused",
        "one process answers all requests here; leave it out, and start more workers if it is too slow",
        (_VLLM,),
        "DYN_VLLM_EMBEDDING_WORKER_PROCESSES",
        harmless=("1",),
    ),
    *_rows("refused", "--classify-worker", _OTHER_WORKER.format("classification"), _VLLM, switch=True),
    *_rows("refused", "--realtime", _OTHER_WORKER.format("realtime sessions"), _VLLM, switch=True),
    PeerFlag("--model-express-url", "ignored", "Dynamo's worker ignores it as well", (_VLLM,)),
    *_rows(
        "refused",
        "--gms-shadow-mode",
        "this worker does not use Dynamo's GPU memory service; leave it out",
        _VLLM,
        switch=True,
    ),
    PeerFlag(
        "--benchmark-mode",
        "refused",
        "this worker does not measure itself; use Dynamo's own worker to profile a model",
        (_VLLM,),
        "DYN_BENCHMARK_MODE",
    ),
    *(
        PeerFlag(f"--{name}", "ignored", _ONLY_BENCHMARK, (_VLLM,))
        for name in (
            *("benchmark-points-file", "benchmark-warmup-iterations", "benchmark-output-path", "benchmark-timeout"),
            *("benchmark-max-batch-size", "benchmark-prefill-granularity", "benchmark-prefill-kv-read-granularity"),
            *("benchmark-prefill-batch-granularity", "benchmark-decode-length-granularity"),
            *("benchmark-decode-batch-granularity", "prefill-max-new-token-samples"),
            *("prefill-max-kv-read-token-samples", "decode-max-kv-read-token-samples"),
            *("decode-max-batch-size-samples", "prefix-max-batch-size-samples"),
        )
    ),
    *(
        PeerFlag(f"--benchmark-{name}", "ignored", _ONLY_BENCHMARK, (_VLLM,), switch=True)
        for name in ("randomize-kda-state", "hybrid-live-state", "collect-imbalanced")
    ),
]

_OF_SGLANG: Final = [
    PeerFlag("--disaggregation-mode", "honoured", _MODES, (_SGLANG,), refuses=_ENCODE),
    *_honoured("--enable-rl", _SGLANG, text="with the routes for weights", env="DYN_SGL_ENABLE_RL", switch=True),
    PeerFlag("--sglang-trace-level", "honoured", "", (_SGLANG,), "SGLANG_TRACE_LEVEL"),
    PeerFlag("--disable-piecewise-cuda-graph", "honoured", "as `--cuda-graph-backend-prefill disabled`", (_SGLANG,)),
    PeerFlag("--load-format", "honoured", "`gms` is refused", (_SGLANG,), refuses=_GMS),
    PeerFlag("--use-sglang-tokenizer", "honoured", _TOKENIZER, (_SGLANG,), "DYN_SGL_USE_TOKENIZER", switch=True),
    PeerFlag(
        "--gateway-workers",
        "refused",
        "one process answers all requests here; leave it out, and start more workers if it is too slow",
        (_SGLANG,),
        "DYN_SGL_GATEWAY_WORKERS",
        harmless=("1",),
    ),
    *_rows("refused", "--enable-multimodal --dedicated-mm-encoder --frontend-decoding", _IMAGES, _SGLANG, switch=True),
    *_rows("ignored", "--embedding-transfer-mode", _ONLY_ENCODERS, _SGLANG),
    *_rows("honoured", "--embedding-worker", "as SGLang's `--is-embedding`", _SGLANG, switch=True),
    *_rows("refused", "--rerank-worker", _OTHER_WORKER.format("reranking"), _SGLANG, switch=True),
    *_rows("refused", "--image-diffusion-worker --video-generation-worker", _DIFFUSION, _SGLANG, switch=True),
    *_rows(
        "refused",
        "--disagg-config --disagg-config-key",
        "write the section of this worker to a file of its own, and use --config FILE",
        _SGLANG,
    ),
    PeerFlag(
        "--engine-route",
        "refused",
        "operators use the worker's own control routes; see docs/operations.md",
        (_SGLANG,),
        "DYN_SGLANG_ENGINE_ROUTES",
    ),
]

_OF_TRTLLM: Final = [
    *_honoured("--served-model-name --tensor-parallel-size --pipeline-parallel-size --kv-block-size", _TRTLLM),
    PeerFlag("--model", "honoured", "", (_TRTLLM,), "DYN_TRTLLM_MODEL", aliases=("--model-path",)),
    *_honoured("--expert-parallel-size --gpus-per-node --max-batch-size --max-num-tokens --max-seq-len", _TRTLLM),
    *_honoured("--max-beam-width", _TRTLLM, text="only 1"),
    *_honoured("--free-gpu-memory-fraction --extra-engine-args --override-engine-args", _TRTLLM),
    *_honoured("--guided-decoding-backend --revision --attn-backend", _TRTLLM),
    PeerFlag("--load-format", "honoured", "`gms` is refused", (_TRTLLM,), refuses=_GMS),
    PeerFlag("--disaggregation-mode", "honoured", _MODES, (_TRTLLM,)),
    *_honoured("--modality", _TRTLLM, text="only `text`"),
    *_honoured("--enable-attention-dp --enable-layerwise-nvtx-marker", _TRTLLM, switch=True),
    PeerFlag(
        "--publish-kv-events",
        "honoured",
        "",
        (_TRTLLM,),
        switch=True,
        aliases=("--publish-events-and-metrics",),
    ),
    *_honoured("--publish-metrics", _TRTLLM, switch=True),
    *_rows(
        "refused",
        "--conversation-affinity",
        "give requests a session instead, which routers keep on one worker",
        _TRTLLM,
        switch=True,
    ),
    *_rows("ignored", "--conversation-affinity-dp-rank-source", "concerns --conversation-affinity only", _TRTLLM),
    *_rows(
        "refused",
        "--model-loader-extra-config",
        "only Dynamo's GPU memory service reads it; leave it out",
        _TRTLLM,
    ),
    *_rows("refused", "--enable-multimodal", _IMAGES, _TRTLLM, switch=True),
    *_rows("refused", "--encode-endpoint", _IMAGES, _TRTLLM),
    *_rows("ignored", "--allowed-local-media-path --max-file-size-mb", _ONLY_MEDIA, _TRTLLM),
    *_rows("refused", "--quant-algo", _DIFFUSION, _TRTLLM),
    *_rows(
        "ignored", "--quant-dynamic --teacache-use-ret-steps --disable-torch-compile", _ONLY_MEDIA, _TRTLLM, switch=True
    ),
    *_rows(
        "ignored",
        "--enable-teacache --enable-fullgraph --enable-cuda-graph --skip-warmup",
        _ONLY_MEDIA,
        _TRTLLM,
        switch=True,
    ),
    *_rows("ignored", "--teacache-thresh --torch-dtype --dit-ulysses-size --dit-ring-size", _ONLY_MEDIA, _TRTLLM),
    *_rows("ignored", "--dit-cfg-size --default-height --default-width --default-num-frames", _ONLY_MEDIA, _TRTLLM),
    *_rows("ignored", "--default-num-inference-steps --default-guidance-scale", _ONLY_MEDIA, _TRTLLM),
    *_rows("ignored", "--default-num-images-per-prompt", _ONLY_MEDIA, _TRTLLM),
]

#: The whole table.
PEER_FLAGS: Final = (*_RUNTIME, *_ROUTING, *_OF_VLLM, *_OF_SGLANG, *_OF_TRTLLM)

#: Variables without a flag that make Dynamo's own workers do what this one does not, and what to do instead.
REFUSED_VARIABLES: Final = {
    "DYN_SNAPSHOT_CONTROL_DIR": "this worker cannot be restored from a snapshot; unset it",
    "DYN_GMS_USE_V1": "this worker does not use Dynamo's GPU memory service; unset it",
}


def markdown_table() -> str:
    """Return the documentation of all flags in Markdown, with one table for each worker."""
    heads = {(): "All workers"} | {(name,): f"`dynamo.{name}`" for name in ENGINES}
    lines = []
    for engines, head in heads.items():
        lines += [f"### {head}", "", "| flag | here | why, or what else to know |", "|---|---|---|"]
        for row in PEER_FLAGS:
            if row.engines == engines:
                names = ", ".join(f"`{name}`" for name in (row.flag, *row.aliases))
                lines.append(f"| {names} | {row.verdict} | {row.text} |")
        lines.append("")
    return "\n".join(lines).rstrip()
