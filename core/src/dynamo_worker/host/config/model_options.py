"""The options about the model's registration: what frontends are told about it.

Flags and variables have the names of Dynamo's own workers. Standard library only, as
:mod:`dynamo_worker.host.config.options`.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from dynamo_worker.host.config.option_types import MODEL, Option

ThinkingMode = Literal["enabled", "disabled"]
StructuralTagScope = Literal["auto", "always"]
StructuralTagSchema = Literal["auto", "strict"]

#: All options of the group.
MODEL_OPTIONS: Final = (
    Option(
        "tool_call_parser",
        MODEL,
        "Frontend parser for tool calls in the output. The short flag is the engine's if the engine has one.",
        "DYN_TOOL_CALL_PARSER",
        metavar="NAME",
        long="--dyn-tool-call-parser",
        alias="--tool-call-parser",
    ),
    Option(
        "reasoning_parser",
        MODEL,
        "Frontend parser for reasoning in the output. The short flag is the engine's if the engine has one.",
        "DYN_REASONING_PARSER",
        metavar="NAME",
        long="--dyn-reasoning-parser",
        alias="--reasoning-parser",
    ),
    Option(
        "default_thinking_mode",
        MODEL,
        "Whether chat templates make the model think, unless the request says so itself.",
        "DYN_DEFAULT_THINKING_MODE",
        default_text="the template's",
        choices=get_args(ThinkingMode),
        long="--dyn-default-thinking-mode",
    ),
    Option(
        "exclude_tools_when_tool_choice_none",
        MODEL,
        "Leave the tools out of the prompt if a request has `tool_choice: none`.",
        "DYN_EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE",
        default=True,
        kind="switch",
    ),
    Option(
        "structural_tag",
        MODEL,
        "Constrain tool calls to the tools' schemas: `true`, `false`, or a JSON object with the keys `scope`, "
        "`schema`, `allow_tool_calls_with_structured_output`, `exclude_special_tokens`, `reasoning_boundary` and "
        "`tool_arguments_any_order`.",
        "DYN_STRUCTURAL_TAG",
        default_text="Dynamo's choice",
        metavar="[JSON]",
        long="--dyn-structural-tag",
        bare="true",
    ),
    Option(
        "enable_structural_tag",
        MODEL,
        "Older form of `--dyn-structural-tag true` and `false`.",
        "DYN_ENABLE_STRUCTURAL_TAG",
        default_text="Dynamo's choice",
        kind="switch",
        long="--dyn-enable-structural-tag",
    ),
    Option(
        "structural_tag_scope",
        MODEL,
        "Older form of the key `scope` of `--dyn-structural-tag`.",
        "DYN_STRUCTURAL_TAG_SCOPE",
        choices=get_args(StructuralTagScope),
        long="--dyn-structural-tag-scope",
    ),
    Option(
        "structural_tag_schema",
        MODEL,
        "Older form of the key `schema` of `--dyn-structural-tag`.",
        "DYN_STRUCTURAL_TAG_SCHEMA",
        choices=get_args(StructuralTagSchema),
        long="--dyn-structural-tag-schema",
    ),
    Option(
        "custom_jinja_template",
        MODEL,
        "Chat template to use instead of the model's own.",
        "DYN_CUSTOM_JINJA_TEMPLATE",
        default_text="the model's",
        metavar="FILE",
    ),
    Option(
        "endpoint_types",
        MODEL,
        "OpenAI APIs to register the model for, separated by commas (chat, completions, embedding, …), or `none`.",
        "DYN_ENDPOINT_TYPES",
        default=(),
        default_text="those the engine supports",
        metavar="LIST",
        alias="--dyn-endpoint-types",
    ),
    Option(
        "kv_state_endpoint",
        MODEL,
        "Endpoint that owns the worker's KV events and their recovery, as `dyn://namespace.component.endpoint`.",
        "DYN_KV_STATE_ENDPOINT",
        default_text="the worker's own",
        metavar="ENDPOINT",
    ),
)
