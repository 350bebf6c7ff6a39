"""What frontends and routers are told about a model."""

from __future__ import annotations

import asyncio
import os

import pytest
from dynamo.llm import ModelType

from dynamo_worker.engine import EndpointSpec, EngineInfo
from dynamo_worker.errors import StartError, UsageError
from dynamo_worker.host.config.settings import WorkerSettings, load
from dynamo_worker.host.discovery import model_card
from dynamo_worker.host.discovery.model_card import model_type


def test_model_types_are_those_of_dynamo():
    assert str(model_type(["chat"])) == str(ModelType.Chat)
    assert str(model_type(["chat", "completions"])) == str(ModelType.Chat | ModelType.Completions)
    assert str(model_type(["completions", "chat", "chat"])) == str(ModelType.Chat | ModelType.Completions)


def test_an_unknown_surface_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="'chatt' is unknown") as raised:
        model_type(["chat", "chatt"])
    assert "completions" in str(raised.value)


def test_no_surface_at_all():
    with pytest.raises(UsageError, match="expected at least one"):
        model_type([])


def test_every_engines_default_is_known():
    model_type(EngineInfo("m", "/m").endpoint_types)


def _problem(what):
    return StartError(what)


@pytest.mark.parametrize("names", [("chat",), ("completions", "chat"), ("prefill",), ("empty",)])
def test_surfaces_of_text_generation_are_served(names):
    model_card.check_endpoint_types(
        EngineInfo("m", "/m", endpoint_types=names), WorkerSettings(engine="echo"), _problem
    )


@pytest.mark.parametrize(
    ("names", "found"), [(("chat", "embedding"), "'embedding' cannot be served"), (("chatt",), "'chatt'"), ((), "none")]
)
def test_an_engine_with_other_surfaces_is_told_what_to_offer(names, found):
    info = EngineInfo("m", "/m", endpoint_types=names)
    with pytest.raises(StartError, match=found) as raised:
        model_card.check_endpoint_types(info, WorkerSettings(engine="echo"), _problem)
    assert "takes_tokens=False" in str(raised.value)


def test_surfaces_that_the_operator_chose_are_refused_by_the_flag():
    settings = load({"engine": "echo", "endpoint_types": "rerank"}, {})
    with pytest.raises(UsageError, match="--endpoint-types rerank: 'rerank' cannot be served") as raised:
        model_card.check_endpoint_types(EngineInfo("m", "/m"), settings, _problem)
    assert "Dynamo's own worker" in str(raised.value.hint)


def test_an_engines_own_endpoint_may_serve_other_surfaces():
    own = EndpointSpec("embed", registers_model=True, takes_tokens=False)
    info = EngineInfo("m", "/m", endpoint_types=("embedding",), endpoints=(own,))
    model_card.check_endpoint_types(info, WorkerSettings(engine="echo"), _problem)
    headless = EngineInfo("m", None, endpoint_types=("embedding",))
    model_card.check_endpoint_types(headless, WorkerSettings(engine="echo"), _problem)


def register(monkeypatch, info, **values):
    calls = []

    async def record(*args, **options):
        calls.append((args, options))

    monkeypatch.setattr(model_card, "register_model", record)

    settings = WorkerSettings(engine="echo", **values)
    asyncio.run(model_card.register("the endpoint", model_card.completed(info, settings), settings))
    return calls


def test_a_model_is_registered_with_what_the_engine_knows(monkeypatch):
    info = EngineInfo(
        "llama",
        "/models/llama",
        model_aliases=("l",),
        worker_type="prefill",
        needs=(("decode",),),
        kv_block_size=16,
        context_length=4096,
        total_kv_blocks=1000,
        max_num_seqs=64,
        bootstrap=("10.0.0.1", 8998),
        runtime_data={"flavour": "sour", "ranks": [0, 1]},
    )
    ((args, options),) = register(monkeypatch, info, tool_call_parser="hermes")
    assert args[3:5] == ("/models/llama", "llama")
    assert str(args[1]) == str(ModelType.Chat | ModelType.Completions)
    assert str(options["worker_type"]).lower().endswith("prefill")
    assert [[str(peer).lower().rpartition(".")[2] for peer in peers] for peers in options["needs"]] == [["decode"]]
    assert options["kv_cache_block_size"] == 16
    assert options["model_aliases"] == ["l"]
    config = options["runtime_config"]
    assert (config.context_length, config.total_kv_blocks, config.max_num_seqs) == (4096, 1000, 64)
    assert config.tool_call_parser == "hermes"
    assert config.reasoning_parser is None
    assert config.get_engine_specific("flavour") == "sour"
    assert options["max_gpu_lora_count"] is None


def test_no_path_of_this_machine_is_in_the_card_of_a_text_engine(monkeypatch):
    """Of workers whose cards differ in it, frontends use only one; and they replace an alias by the model's name."""
    info = EngineInfo("llama", "/models/llama", model_input="text", model_aliases=("l",), lora_adapters=("poet",))
    calls = register(monkeypatch, info)
    assert [args[3:5] for args, _ in calls] == [("llama", "llama"), ("llama", "poet"), ("llama", "l")]
    assert all(options["skip_model_assets"] for _, options in calls)
    (_, main), *others = calls
    assert main["model_aliases"] is None
    assert [(options["lora_name"], options["base_model_path"]) for _, options in others] == [
        ("poet", "llama"),
        ("l", "llama"),
    ]


@pytest.mark.parametrize(("refusal", "served"), [("model update cannot change identity", 2), ("lease lost", 0)])
def test_an_alias_with_the_key_of_another_one_is_left_out(monkeypatch, caplog, refusal, served):
    async def refuse(*args, **options):
        if args[4] == "A:1":
            raise RuntimeError(refusal)

    monkeypatch.setattr(model_card, "register_model", refuse)
    info = EngineInfo("m", "m", model_input="text", model_aliases=("a/1", "A:1"))
    registering = model_card.register("the endpoint", info, WorkerSettings(engine="echo"))
    if served:
        assert asyncio.run(registering) == served
        assert "A model is not served" in caplog.text
    else:
        with pytest.raises(StartError, match="the model 'A:1' cannot be registered: lease lost"):
            asyncio.run(registering)


def test_frontends_learn_how_many_adapters_fit_before_there_is_one(monkeypatch):
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m", max_loras=4))
    assert options["max_gpu_lora_count"] == 4


def test_where_the_worker_is(monkeypatch):
    topology = {"topology_domains": {"zone": "a"}, "kv_transfer_domain": "zone", "kv_transfer_preferred_weight": None}
    info = model_card.completed(EngineInfo("m", "/m"), WorkerSettings(engine="echo"), topology)
    ((_, options),) = register(monkeypatch, info)
    assert options["runtime_config"].topology_domains == {"zone": "a"}
    assert options["runtime_config"].kv_transfer_domain == "zone"


def test_the_settings_overrule_the_engines_surfaces(monkeypatch):
    ((args, _),) = register(monkeypatch, EngineInfo("m", "/m"), endpoint_types=("embedding",))
    assert str(args[1]) == str(ModelType.Embedding)


@pytest.mark.parametrize(
    ("planted", "reason"),
    [("nothing", "No such file"), ("directory", "Not a regular file"), ("fifo", "Not a regular file")],
)
def test_a_chat_template_that_is_none_is_named(monkeypatch, tmp_path, planted, reason):
    """The runtime would read a FIFO without end."""
    path = tmp_path / "chat.jinja"
    if planted == "directory":
        path.mkdir()
    elif planted == "fifo":
        os.mkfifo(path)
    with pytest.raises(StartError, match=rf"--custom-jinja-template {path} .*cannot be read: {reason}"):
        register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=path)


def test_a_chat_template_without_end_is_none(monkeypatch, tmp_path):
    path = tmp_path / "chat.jinja"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(StartError, match=rf"--custom-jinja-template {path} .*has 1073741824 bytes"):
        register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=path)


def test_a_chat_template_is_handed_over(monkeypatch, tmp_path):
    (tmp_path / "data").write_text("{{ messages }}")
    (tmp_path / "chat.jinja").symlink_to("data")
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m"), custom_jinja_template=tmp_path / "chat.jinja")
    assert options["custom_template_path"] == str(tmp_path / "chat.jinja")


def test_a_model_that_cannot_be_registered_is_named(monkeypatch):
    async def fail(*args, **options):
        raise RuntimeError("no tokenizer.json")

    monkeypatch.setattr(model_card, "register_model", fail)

    with pytest.raises(StartError, match=r"'llama' at /models/llama cannot be registered: no tokenizer\.json"):
        asyncio.run(model_card.register("the endpoint", EngineInfo("llama", "/models/llama"), WorkerSettings()))


def test_what_the_settings_tell_frontends(monkeypatch):
    values = {
        "default_thinking_mode": "disabled",
        "exclude_tools_when_tool_choice_none": False,
        "kv_state_endpoint": "dyn://dynamo.kv.state",
    }
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m", runtime_data={"flavour": "sour"}), **values)
    config = options["runtime_config"]
    assert config.get_engine_specific("default_thinking_mode") == "disabled"
    assert config.get_engine_specific("flavour") == "sour"
    assert config.exclude_tools_when_tool_choice_none is False
    assert "kv" in config.kv_state_endpoint


DEFAULT_TAG = {
    "scope": "always",
    "schema": "auto",
    "allow_tool_calls_with_structured_output": False,
    "reasoning_boundary": "auto",
    "tool_arguments_any_order": False,
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, DEFAULT_TAG),
        ({"structural_tag": True}, DEFAULT_TAG),
        ({"structural_tag": {"schema": "strict"}}, DEFAULT_TAG | {"schema": "strict"}),
        ({"enable_structural_tag": True, "structural_tag_scope": "auto"}, DEFAULT_TAG | {"scope": "auto"}),
        ({"structural_tag_schema": "strict"}, DEFAULT_TAG | {"schema": "strict"}),
        ({"structural_tag": False}, None),
        ({"enable_structural_tag": False}, None),
    ],
)
def test_how_tool_calls_are_constrained(values, expected, monkeypatch):
    """As Dynamo's own workers say it; adapters are told the same."""
    info = EngineInfo("m", "/m", lora_adapters=("poet",))
    (_, base), (_, adapter) = register(monkeypatch, info, **values)
    assert base["runtime_config"].structural_tag == expected
    assert adapter["runtime_config"].structural_tag == expected


@pytest.mark.parametrize("mode", ["kv", "round-robin", "random", "least-loaded"])
def test_a_worker_may_say_how_to_route_to_it(mode, monkeypatch):
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m"), router_mode=mode)
    assert options["router_config"] is not None
    assert WorkerSettings(engine="echo", router_mode=mode).contradictions() == []


def test_otherwise_that_is_the_frontends_choice(monkeypatch):
    ((_, options),) = register(monkeypatch, EngineInfo("m", "/m"), frontend="127.0.0.1:8000")
    assert options["router_config"] is None
