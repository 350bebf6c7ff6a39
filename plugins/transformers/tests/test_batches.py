"""The model in transformers' batching loop, without a worker: one loop for most of the tests."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamo_worker.testing.tiny_model import make, make_adapter
from dynamo_worker_transformers import batches as module
from dynamo_worker_transformers.batches import Batches, LoadError, Update, load

GREEDY = {"temperature": 0.0}


def settings(model: Path | str, **given: Any) -> dict[str, Any]:
    nothing = ("attn_implementation", "device", "max_model_len", "max_memory_percent", "max_requests_per_batch")
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64}
    flags = {"trust_remote_code": False, "dtype": "auto", "prefix_sharing": True, "enable_lora": False}
    return {"model": str(model), **dict.fromkeys(nothing), **sizes, **flags, **given}


@contextlib.contextmanager
def running(model: Path, **given: Any) -> Iterator[Batches]:
    options = settings(model, **given)
    batches = Batches(load(options), options)
    try:
        yield batches
    finally:
        batches.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Batches]:
    with running(model, enable_lora=True) as batches:
        yield batches


def answers(batches: Batches, count: int, seconds: float = 60.0) -> dict[str, list[Update]]:
    """Return what the loop reports until so many answers have ended."""
    found: dict[str, list[Update]] = {}
    until = time.monotonic() + seconds
    while sum(updates[-1].finished for updates in found.values()) < count:
        assert time.monotonic() < until, found
        assert batches.failure() is None
        for update in batches.updates(0.1):
            assert update.error is None
            found.setdefault(update.answer_id, []).append(update)
    return found


def tokens(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.tokens]


def answer(batches: Batches, prompt: list[int], limit: int = 12, **given: Any) -> list[int]:
    batches.add(
        "one", prompt, limit, given.pop("ends", ()), given.pop("parameters", GREEDY), given.pop("adapter", None)
    )
    return tokens(answers(batches, 1)["one"])


@pytest.fixture(scope="module")
def right(model: Path) -> Callable[[list[int], int], list[int]]:
    """Return what transformers' plain ``generate`` makes of a prompt."""
    plain = AutoModelForCausalLM.from_pretrained(model)

    def generate(prompt: list[int], limit: int) -> list[int]:
        made = plain.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, eos_token_id=None)
        return made[0, len(prompt) :].tolist()

    return generate


def test_the_answers_are_those_of_generate(shared: Batches, right: Callable[[list[int], int], list[int]]) -> None:
    """Of many at once, some of which are longer than a step."""
    prompts = [[5 + number] * (1 + 9 * number) for number in range(16)]
    for number, prompt in enumerate(prompts):
        shared.add(str(number), prompt, 10 + number, (), GREEDY)
    found = answers(shared, len(prompts))
    for number, prompt in enumerate(prompts):
        updates = found[str(number)]
        assert tokens(updates) == right(prompt, 10 + number)
        assert len(updates) == 10 + number, "tokens come one by one"
        assert [update.finished for update in updates] == [False] * (9 + number) + [True]


def test_an_answer_ends_at_a_token(shared: Batches) -> None:
    plain = answer(shared, [7, 8, 9])
    end = plain[5]
    assert answer(shared, [7, 8, 9], ends=[end, 999]) == plain[: plain.index(end) + 1]
    later = answer(shared, [7, 8, 9], ends=[end], parameters={**GREEDY, "min_tokens": 12})
    assert len(later) == 12
    assert end not in later[:11]


def test_log_probabilities(shared: Batches, right: Callable[[list[int], int], list[int]]) -> None:
    shared.add("plain", [7, 8, 9], 5, (), GREEDY)
    shared.add("with", [7, 8, 9], 5, (), {**GREEDY, "logprobs": 2})
    found = answers(shared, 2)
    assert not any(update.logprobs for update in found["plain"])
    chosen = [entry for update in found["with"] for entry in update.logprobs]
    assert [entry.tokens[0] for entry in chosen] == tokens(found["with"]) == right([7, 8, 9], 5)
    assert all(entry.rank == 1 and entry.chosen == entry.values[0] > entry.values[1] for entry in chosen)


def test_a_cancelled_answer_ends_before_the_next_step(shared: Batches) -> None:
    shared.add("gone", [7], 900, (), GREEDY)
    shared.add("stays", [8], 30, (), GREEDY)
    assert shared.updates(10.0)
    shared.cancel("gone")
    found = answers(shared, 1)
    assert "gone" not in found
    assert len(tokens(found["stays"])) >= 28
    assert shared.used_blocks() == 0
    before = shared.steps
    time.sleep(0.2)
    assert shared.steps - before <= 1
    shared.cancel("gone")  # it does not exist any more
    assert answer(shared, [7], 3)


def test_an_answer_that_is_cancelled_while_the_loop_takes_it(shared: Batches) -> None:
    """The loop reads requests first, and forgets a cancellation of a request that it does not have."""
    shared._manager.cancel_queue.put("late")
    shared._manager._wake_up_loop.set()
    time.sleep(0.2)
    shared.add("late", [7], 900, (), GREEDY)
    shared._running.pop("late")
    before, until = shared.steps, time.monotonic() + 10
    while shared._manager.batch_processor.scheduler.active_requests or shared.steps == before:
        assert shared.updates(0.05) == []
        assert time.monotonic() < until
    assert shared.steps - before < 100


def test_adapters_change_their_own_tokens_only(shared: Batches, tmp_path: Path) -> None:
    """In one batch with others and with the model itself."""
    adapters = shared.adapters
    assert adapters is not None
    plain = answer(shared, [7, 8, 9])
    weights = make_adapter(tmp_path / "adapter")
    other = shutil.copytree(weights, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    for number, path in ((1, weights), (2, other)):
        with shared.at_rest():
            adapters.load(number, str(path))
    alone = {number: answer(shared, [7, 8, 9], adapter=number) for number in (1, 2, None)}
    assert alone[None] == plain != alone[1] != alone[2] != plain
    for index in range(9):
        shared.add(str(index), [7, 8, 9], 12, (), GREEDY, (None, 1, 2)[index % 3])
    found = answers(shared, 9)
    assert all(tokens(found[str(index)]) == alone[(None, 1, 2)[index % 3]] for index in range(9))
    with shared.at_rest():
        adapters.unload(1)
    assert answer(shared, [7, 8, 9], adapter=2) == alone[2]
    with shared.at_rest():
        adapters.unload(2)
        adapters.unload(2)
    assert answer(shared, [7, 8, 9]) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"r": 4}, "mismatch"),
        ({"target_modules": ["lm_head"]}, "cannot be used"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_work_leaves_nothing(
    shared: Batches, tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    adapters = shared.adapters
    assert adapters is not None
    plain = answer(shared, [7, 8, 9])
    directory = make_adapter(tmp_path)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message), shared.at_rest():
        adapters.load(3, str(directory))
    assert answer(shared, [7, 8, 9]) == plain


def test_more_than_fits_into_the_cache(model: Path, right: Callable[[list[int], int], list[int]]) -> None:
    """The loop restarts requests for want of room: nobody sees it, log probabilities and penalties included."""
    with running(model, num_blocks=8, page_size=16) as batches:
        assert batches.context_length <= 128
        parameters = {**GREEDY, "logprobs": 1, "presence_penalty": 1e-9}
        for index in range(6):
            batches.add(str(index), [7 + index] * 10, 60, (), parameters)
        found = answers(batches, 6)
        for index in range(6):
            expected = right([7 + index] * 10, 60)
            assert tokens(found[str(index)]) == expected
            chosen = [entry for update in found[str(index)] for entry in update.logprobs]
            assert [entry.tokens[0] for entry in chosen] == expected
        longest = batches.context_length
        assert len(answer(batches, [7], longest - 1)) == longest - 1


def test_a_loop_that_fails_says_why(model: Path) -> None:
    with running(model) as batches:
        batches.add("last", [7], 900, (), GREEDY)
        assert batches.updates(10.0)

        def out_of_memory(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        batches.module.register_forward_pre_hook(out_of_memory)
        until = time.monotonic() + 10
        errors: list[str] = []
        while batches.failure() is None:
            assert time.monotonic() < until
            errors += [update.error for update in batches.updates(0.05) if update.error is not None]
        assert "out of memory" in str(batches.failure())
        errors += [update.error for update in batches.updates(0.05) if update.error is not None]
        assert len(errors) == 1


# ----------------------------------------------------------------------------------------- models that cannot be loaded


def refused(model: Path | str, **given: Any) -> str:
    options = settings(model, **given)
    with pytest.raises(LoadError) as raised:
        Batches(load(options), options)
    return str(raised.value)


def test_a_model_that_is_missing(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere")


def test_a_model_without_weights(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "model.safetensors" in refused(copy)


def test_a_model_with_a_part_of_its_weights(model: Path, tmp_path: Path) -> None:
    """transformers would fill in random numbers."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing, as model.layers.1.mlp.up_proj.weight" in refused(copy)


def test_weights_that_are_broken(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "cannot load" in refused(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json"),
        ('{"model_type": "new"}', "new"),
        ('{"model_type": "vit"}', "ViTConfig"),
    ],
)
def test_a_model_of_another_kind(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert message in refused(tmp_path)


def test_a_model_that_the_loop_cannot_batch(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2)
    ).save_pretrained(tmp_path)
    assert "cannot batch this model (MambaForCausalLM)" in refused(tmp_path, max_model_len=64)
    assert "states no context length: set --max-model-len" in refused(tmp_path)


def test_a_cache_that_does_not_fit(model: Path) -> None:
    assert "no memory for the KV cache" in refused(model, num_blocks=10**9)


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's answer, from a server of our own, in a process that may ask it."""
    import subprocess
    import sys

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to model some/gated is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: Any) -> None:
            pass

    code = "import json, sys; from dynamo_worker_transformers import batches\n"
    code += "try: batches.load(json.load(sys.stdin))\nexcept batches.LoadError as error: print(error)"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(settings("some/gated")),
            capture_output=True,
            text=True,
            timeout=90,
            check=True,
        )
        server.shutdown()
    assert "cannot load some/gated" in done.stdout
    assert "gated" in done.stdout.replace("some/gated", "")


def test_the_defaults_fit_a_machine(model: Path) -> None:
    """On a CPU transformers would take 60 % of the memory."""
    options = settings(model, num_blocks=None, max_batch_tokens=None, page_size=64)
    config = module._config(load(options).module, 4096, options)
    assert (config.num_blocks, config.max_batch_tokens) == (512, 512)
