"""What a request contains: ``PreprocessedRequest`` of Dynamo 1.6.1 as an engine receives it.

The field names are those of the runtime's own serializer; inferred meanings are marked so. Every field but
``token_ids`` may be missing, and every value inside the sections may be None. Clients that skip the frontend can put
anything into a request: read values with the readers of :mod:`dynamo_worker.kit.fields`, which check types and limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003 - typing.get_type_hints looks them up
from typing import Any, TypedDict


class GuidedDecoding(TypedDict, total=False):
    """A constraint on the text of the answer: ``GuidedDecodingOptions`` of Dynamo.

    :param json: a JSON schema, as an object or as its text.
    :param regex: a regular expression that the whole answer matches.
    :param choice: the texts to choose from.
    :param grammar: a context-free grammar in EBNF.
    :param whitespace_pattern: a regular expression for whitespace between JSON tokens.
    :param structural_tag: tags that switch between free text and constraints, as an object or as its JSON text.
    :param backend: the grammar backend to use; an engine has one for all requests and refuses any other than ``auto``.
    """

    json: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    whitespace_pattern: str | None
    structural_tag: Mapping[str, Any] | str | None
    backend: str | None


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen: ``SamplingOptions`` of Dynamo.

    :param n: number of answers; each has its own ``index`` in the chunks.
    :param best_of: number of answers to choose from; OpenAI's completions only.
    :param temperature: divides the logits; 0 always takes the likeliest token.
    :param top_p: probability mass to choose from, above 0 up to 1.
    :param top_k: number of likeliest tokens to choose from; -1 or 0 is all, depending on the engine.
    :param min_p: least probability, relative to the likeliest token, from 0 to 1.
    :param presence_penalty: subtracted from the logit of each token that occurred, from -2 to 2.
    :param frequency_penalty: subtracted once per occurrence, from -2 to 2.
    :param repetition_penalty: divides the logits of tokens that occurred; 1 changes nothing.
    :param seed: seed of the random numbers for this request.
    :param use_beam_search: search by beams instead of sampling.
    :param length_penalty: exponent of the length in the score of a beam.
    :param include_stop_str_in_output: whether the text ends with the stop string; the frontend does this.
    :param guided_decoding: constraint on the text of the answer.
    """

    n: int | None
    best_of: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    use_beam_search: bool | None
    length_penalty: float | None
    include_stop_str_in_output: bool | None
    guided_decoding: GuidedDecoding | None


class StopConditions(TypedDict, total=False):
    """When an answer ends: ``StopConditions`` of Dynamo.

    :param max_tokens: longest answer in tokens. Missing: up to the context length. May be 0: answer with no token and
        ``finish_reason`` ``length``.
    :param min_tokens: shortest answer in tokens: no end-of-sequence or stop token before.
    :param stop: stop strings; the frontend detokenizes and stops at them.
    :param stop_token_ids: tokens that end the answer.
    :param stop_token_ids_visible: the same, kept in the text.
    :param stop_token_ids_hidden: the same, removed from the text by the frontend.
    :param ignore_eos: go on past the end-of-sequence token.
    :param max_thinking_tokens: longest reasoning part in tokens.
    """

    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    stop_token_ids_visible: Sequence[int] | None
    stop_token_ids_hidden: Sequence[int] | None
    ignore_eos: bool | None
    max_thinking_tokens: int | None


class OutputOptions(TypedDict, total=False):
    """What is returned beside the tokens: ``OutputOptions`` of Dynamo.

    :param logprobs: number of likeliest tokens to list for each token of the answer; 0 asks for the chosen token's log
        probability alone. 2³²-1 (-1) asks for the whole vocabulary.
    :param prompt_logprobs: the same for the tokens of the prompt.
    :param skip_special_tokens: leave special tokens out of the text; the frontend does this.
    :param formatted_prompt: return the prompt after the chat template; the frontend does this.
    :param return_tokens_as_token_ids: show tokens as ids in log probabilities; the frontend does this.
    :param no_stop_trim: keep the stop token in the text; the frontend does this.
    """

    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    formatted_prompt: bool | None
    return_tokens_as_token_ids: bool | None
    no_stop_trim: bool | None


class Routing(TypedDict, total=False):
    """What the router decided and what it was told: ``RoutingHints`` of Dynamo.

    :param backend_instance_id: the worker that the request is for.
    :param prefill_worker_id: the worker that prefills it.
    :param decode_worker_id: the worker that decodes it.
    :param dp_rank: the data-parallel rank to use, counted over the whole engine.
    :param prefill_dp_rank: the data-parallel rank that prefilled the request.
    :param priority: higher numbers go first.
    :param priority_jump: how far to move the request up in the router's queue (inferred).
    :param strict_priority: priority class in the router's queue (inferred).
    :param lora_name: the LoRA adapter to use; wins over ``model``.
    :param cache_salt: requests with different salts share no KV blocks.
    :param expected_output_tokens: the caller's estimate of the answer's length, for the router.
    :param allowed_worker_ids: the workers that the router could choose from.
    :param routing_constraints: constraints on the worker, such as ``required_taints``.
    """

    backend_instance_id: int | None
    prefill_worker_id: int | None
    decode_worker_id: int | None
    dp_rank: int | None
    prefill_dp_rank: int | None
    priority: int | None
    priority_jump: float | None
    strict_priority: int | None
    lora_name: str | None
    cache_salt: str | None
    expected_output_tokens: int | None
    allowed_worker_ids: Sequence[int] | None
    routing_constraints: Mapping[str, Any] | None


class BootstrapInfo(TypedDict, total=False):
    """Where a prefill and a decode worker meet: ``BootstrapInfo`` of Dynamo.

    :param bootstrap_host: host name or address of the prefill worker's bootstrap server.
    :param bootstrap_port: its port.
    :param bootstrap_room: number of this handover, below 2⁶³; both workers use the same.
    :param handoff_id: the router's id of the handover (inferred).
    """

    bootstrap_host: str
    bootstrap_port: int
    bootstrap_room: int
    handoff_id: str | None


class PrefillResult(TypedDict, total=False):
    """What the prefill worker handed over to this decode worker: ``PrefillResult`` of Dynamo.

    :param disaggregated_params: ``disaggregated_params`` of the prefill worker's chunk, unchanged.
    :param prompt_tokens_details: the prefill worker's count of cached tokens, for usage reports.
    """

    disaggregated_params: Mapping[str, Any]
    prompt_tokens_details: Mapping[str, Any] | None


class AgentContext(TypedDict, total=False):
    """The agent session that a request belongs to: ``AgentContext`` of Dynamo.

    :param session_id: id of the session.
    :param parent_session_id: id of the session that started it (inferred).
    :param session_final: whether this is the session's last request (inferred).
    :param agent_headers: HTTP headers about the agent (inferred).
    :param input_trigger: what caused the request: ``user_message``, ``tool_result`` or ``other``.
    """

    session_id: str | None
    parent_session_id: str | None
    session_final: bool | None
    agent_headers: Mapping[str, Any] | None
    input_trigger: str | None


class ExtraArgs(TypedDict, total=False):
    """What the frontend passes on without a separate field.

    :param sampling_options: sampling options that Dynamo has no field for, such as ``logit_bias``.
    :param nvext: the client's ``nvext`` object as far as the frontend does not use it.
    :param reasoning_ended: whether the prompt is already past its reasoning part.
    :param reasoning_parser_kwargs: arguments for the engine's reasoning parser.
    """

    sampling_options: Mapping[str, Any] | None
    nvext: Mapping[str, Any] | None
    reasoning_ended: bool | None
    reasoning_parser_kwargs: Mapping[str, Any] | None


class _Prompt(TypedDict):
    token_ids: list[int]


class Request(_Prompt, total=False):
    """One request, with the prompt as tokens: ``PreprocessedRequest`` of Dynamo.

    :param token_ids: the prompt, never empty. Always a list of ints here: the worker unpacks the packed form and
        refuses tokens outside of ``EngineInfo.vocab_size``. After a migration the first tokens of the answer follow the
        prompt, and ``max_tokens`` and ``min_tokens`` are reduced by their number.
    :param model: the name the client asked for.
    :param sampling_options: how tokens are chosen.
    :param stop_conditions: when the answer ends.
    :param output_options: what is returned beside the tokens.
    :param eos_token_ids: the model's end-of-sequence tokens, at which the frontend stops as well.
    :param annotations: marks such as ``bypass-remote-prefill``.
    :param mdc_sum: checksum of the model deployment card.
    :param routing: what the router decided.
    :param router_config_override: settings of the router for this request.
    :param router: the client's ``nvext.router``: latency targets for the router.
    :param prefill_result: for a decode worker: what the prefill worker handed over.
    :param bootstrap_info: for prefill and decode workers: where they meet.
    :param encoder_result: what an encode worker handed over.
    :param kv_hint: what the orchestrator wants done with the request's KV blocks.
    :param require_reasoning: whether the model reasons before the constrained part of its answer.
    :param extra_args: what the frontend passes on without a separate field.
    :param agent_context: the agent session that the request belongs to.
    :param prompt_embeds: the prompt as embeddings (inferred).
    :param multi_modal_data: images, video and audio, by kind.
    :param multi_modal_uuids: ids of the multimodal items, for caching (inferred).
    :param mm_routing_info: the router's view of a multimodal prompt: ``routing_token_ids``, ``block_mm_infos``,
        ``expanded_prompt_len``.
    :param mm_processor_kwargs: arguments for the multimodal processor (inferred).
    :param media_io_kwargs: arguments for decoding media (inferred).
    :param image_cache_scope: which requests may share cached images (inferred).
    :param migration_link: trace of the request before it migrated (inferred).
    :param request_timestamp_ms: the client's ``nvext.request_timestamp_ms``: the time of the request in milliseconds.
    :param _HEALTH_CHECK: True in Dynamo's own health check requests, which are answered without another worker.
    """

    model: str
    sampling_options: SamplingOptions
    stop_conditions: StopConditions
    output_options: OutputOptions
    eos_token_ids: Sequence[int]
    annotations: Sequence[str]
    mdc_sum: str | None
    routing: Routing | None
    router_config_override: Mapping[str, Any] | None
    router: Mapping[str, Any] | None
    prefill_result: PrefillResult | None
    bootstrap_info: BootstrapInfo | None
    encoder_result: Mapping[str, Any] | None
    kv_hint: Mapping[str, Any] | None
    require_reasoning: bool | None
    extra_args: ExtraArgs | None
    agent_context: AgentContext | None
    prompt_embeds: str | None
    multi_modal_data: Mapping[str, Any] | None
    multi_modal_uuids: Mapping[str, Any] | None
    mm_routing_info: Mapping[str, Any] | None
    mm_processor_kwargs: Mapping[str, Any] | None
    media_io_kwargs: Mapping[str, Any] | None
    image_cache_scope: str | None
    migration_link: Mapping[str, Any] | None
    request_timestamp_ms: float | None
    _HEALTH_CHECK: bool
