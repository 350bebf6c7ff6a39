"""Embeddings: the vectors are those of transformers used directly, pooled as sentence-transformers does."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dynamo_worker import InvalidRequestError
from dynamo_worker.testing import Cluster, Subject
from dynamo_worker.testing.conformance import EngineConformance
from dynamo_worker.testing.tiny_model import make, make_embedding
from dynamo_worker_transformers.batches import LoadError
from dynamo_worker_transformers.embedding_core import EmbeddingCore
from dynamo_worker_transformers.embedding_model import EmbeddingModel

TEXTS = ["The quick brown fox", "jumps", "over the lazy dog. " * 8, "Grüße, world!"]
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("max_model_len", "device", "attn_implementation", "pooling"), None),
    **dict.fromkeys(("max_batch_tokens", "max_requests_per_batch"), None),
    "trust_remote_code": False,
    "matryoshka": False,
    "dtype": "auto",
    "normalize": True,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedding(tmp_path_factory.mktemp("models") / "bert")


def loaded(path: Path, **settings: Any) -> EmbeddingModel:
    return EmbeddingModel({**SETTINGS, "model": str(path), **settings})


def unpacked(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def own(model: EmbeddingModel, *texts: str, dimensions: int | None = None) -> list[list[float]]:
    batch = [model.tokens(text, None, None) for text in texts]
    return [unpacked(model.finished(vector, dimensions)) for vector in model.vectors(batch)]


def direct(path: Path, pooling: str, *texts: str, normalize: bool = True) -> list[list[float]]:
    """Return the vectors of one batch, computed with transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    vectors = []
    for states, mask in zip(hidden, batch["attention_mask"], strict=True):
        used = states[mask.bool()]
        vector = {"mean": (states * mask[:, None]).sum(0) / mask.sum(), "cls": used[0], "last": used[-1]}[pooling]
        vectors.append(torch.nn.functional.normalize(vector, dim=0) if normalize else vector)
    return [vector.tolist() for vector in vectors]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_equal_those_of_transformers(bert: Path, pooling: str) -> None:
    """Exactly, for each input alone and for a batch."""
    model = loaded(bert, pooling=pooling)
    for text in TEXTS:
        assert own(model, text) == direct(bert, pooling, text)
    assert own(model, *TEXTS) == direct(bert, pooling, *TEXTS)
    assert len({str(vector) for vector in own(model, *TEXTS)}) == len(TEXTS)


def test_a_causal_model_makes_embeddings_too(tmp_path: Path) -> None:
    """Without files for sentence-transformers: the flags say how, and the mean is the default."""
    path = make(tmp_path / "llama")
    assert own(loaded(path), TEXTS[0]) == direct(path, "mean", TEXTS[0])
    last = loaded(path, pooling="last", normalize=False)
    assert own(last, *TEXTS) == direct(path, "last", *TEXTS, normalize=False)
    assert (last.context_length, last.dimensions, last.shorter) == (4096, 64, False)


@pytest.mark.parametrize(("file", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_models_files_say_how(tmp_path: Path, file: str, pooling: str, normalize: bool) -> None:
    path = make_embedding(tmp_path / "model", pooling=file, normalize=normalize)
    model = loaded(path)
    assert model.recipe == (pooling, normalize, 128)
    assert model.context_length == 128
    assert own(model, TEXTS[0]) == direct(path, pooling, TEXTS[0], normalize=normalize)
    assert not loaded(path, normalize=False).recipe.normalize


def test_newer_files_name_the_pooling_in_one_word(bert: Path, tmp_path: Path) -> None:
    path = make_embedding(tmp_path / "model")
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert loaded(path).recipe.pooling == "last"


def test_what_the_files_want_and_this_engine_cannot_do_is_refused(tmp_path: Path) -> None:
    path = make_embedding(tmp_path / "model", pooling="max")
    with pytest.raises(LoadError, match=r"its pooling is pooling_mode_max_tokens; mean, cls and last are known"):
        loaded(path)
    assert loaded(path, pooling="mean").recipe.pooling == "mean"
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(LoadError, match=r"modules.json has Dense, and only Transformer, Pooling, Normalize are known"):
        loaded(path)
    (path / "modules.json").write_text("{")
    with pytest.raises(LoadError, match="cannot load"):
        loaded(path)


def test_shorter_vectors_are_for_models_that_were_trained_for_them(bert: Path, tmp_path: Path) -> None:
    assert loaded(bert).shorter is False
    assert loaded(bert, matryoshka=True).shorter is True
    path = make_embedding(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [16, 32, 64, 128]}))
    assert loaded(path).shorter == [16, 32, 64]
    model = loaded(bert, matryoshka=True)
    ((*short,),) = own(model, TEXTS[0], dimensions=16)
    whole = torch.tensor(direct(bert, "mean", TEXTS[0], normalize=False)[0])
    assert short == torch.nn.functional.normalize(whole[:16], dim=0).tolist()


def test_texts_are_cut_only_if_the_client_says_so(bert: Path) -> None:
    model = loaded(bert)
    assert len(model.tokens("dog " * 126, None, None)) == 128
    with pytest.raises(InvalidRequestError, match="an input has 129 tokens; the model's context length is 128"):
        model.tokens("dog " * 127, None, None)
    assert len(model.tokens("dog " * 500, -1, None)) == 128
    assert len(model.tokens("dog " * 500, 300, None)) == 128
    for limit in (5, 2, 1):
        assert len(model.tokens("dog " * 500, limit, None)) == limit
    assert len(model.tokens("dog dog", None, False)) == 2
    with pytest.raises(InvalidRequestError, match="an input has no tokens"):
        model.tokens(" ", None, False)


class Outbox:
    """Notes what a core sends."""

    def __init__(self, core: EmbeddingCore) -> None:
        self.sent: list[tuple[str, int, bool]] = []
        self.failed: dict[str, str] = {}
        core.send = lambda request_id, chunk, *, last=False: self.sent.append((request_id, chunk["index"], last))  # type: ignore[method-assign]
        core.fail = lambda request_id, error: self.failed.__setitem__(request_id, str(error))  # type: ignore[method-assign]


Core = Callable[..., tuple[EmbeddingCore, Outbox]]


@pytest.fixture
def core(bert: Path) -> Core:
    def make_core(**settings: Any) -> tuple[EmbeddingCore, Outbox]:
        core = EmbeddingCore()
        core.start({**SETTINGS, "model": str(bert), **settings})
        return core, Outbox(core)

    return make_core


def payload(*inputs: str | list[int], **fields: Any) -> dict[str, Any]:
    return {
        "inputs": list(inputs),
        "dimensions": None,
        "truncate_prompt_tokens": None,
        "add_special_tokens": None,
    } | fields


def test_requests_take_turns_in_a_batch(core: Core) -> None:
    """A small request is in the next batch, however many inputs the one before it has."""
    engine, outbox = core(max_requests_per_batch=4)
    engine.add("large", payload(*["dog"] * 6))
    engine.add("small", payload("fox"))
    engine.step()
    assert outbox.sent == [("large", 0, False), ("small", 0, True), ("large", 1, False), ("large", 2, False)]
    engine.step()
    assert outbox.sent[4:] == [("large", 3, False), ("large", 4, False), ("large", 5, True)]
    assert engine.answer("load", None) == {"requests": 0}


def test_batches_have_a_limit_of_tokens_with_their_padding(core: Core) -> None:
    engine, outbox = core(max_batch_tokens=20)
    engine.add("a", payload([7] * 5, [7] * 5, [7] * 12, [7] * 100))
    for expected in ([0, 1], [2], [3]):
        outbox.sent.clear()
        engine.step()
        assert [index for _, index, _ in outbox.sent] == expected


def test_one_bad_input_fails_its_request_only(core: Core) -> None:
    engine, outbox = core()
    engine.add("bad", payload("dog", "dog " * 500))
    engine.add("good", payload("fox"))
    while engine.answer("load", None)["requests"]:
        engine.step()
    assert outbox.failed == {"bad": "input: an input has 502 tokens; the model's context length is 128"}
    assert ("good", 0, True) in outbox.sent


def test_a_text_that_the_tokenizer_cannot_take_fails_its_request_only(core: Core) -> None:
    """A frontend lets no such text through, but others can reach the worker."""
    engine, outbox = core()
    engine.add("bad", payload("\ud800"))
    engine.add("good", payload("fox"))
    engine.step()
    assert "bad" in outbox.failed
    assert outbox.sent == [("good", 0, True)]


def test_an_aborted_request_leaves_the_batches(core: Core) -> None:
    engine, outbox = core(max_requests_per_batch=1)
    engine.add("a", payload("dog", "fox"))
    engine.step()
    engine.abort("a")
    assert engine.step() is None
    assert outbox.sent == [("a", 0, False)]


def embedding_subject(path: Path, *flags: str) -> Subject:
    return Subject(
        "transformers",
        ["--model", str(path), "--served-model-name", "tiny", "--embedding", *flags],
        model="tiny",
        start_seconds=90.0,
        processes={"core": r"dynamo_worker_transformers\.embedding_core:EmbeddingCore"},
        migrates=False,
    )


@pytest.mark.timeout(300)
class TestConformance(EngineConformance):
    @pytest.fixture
    def subject(self, bert: Path) -> Subject:
        return embedding_subject(bert, "--matryoshka")


@pytest.mark.timeout(300)
def test_a_worker_serves_them(cluster: Cluster, bert: Path) -> None:
    """Through the real frontend, exactly; what only text generation has is refused by name."""
    cluster.engine_args = embedding_subject(bert).args
    cluster.model, cluster.start_seconds = "tiny", 90.0
    refused = cluster.run(*cluster.engine_args, "--enable-lora")
    assert refused.returncode == 2
    assert "--enable-lora is not for embeddings" in refused.stderr
    (worker,) = cluster.serve(1)
    for text in TEXTS:
        status, answer = cluster.embed(text, encoding_format="base64")
        assert status == 200, answer
        assert unpacked(base64.b64decode(answer["data"][0]["embedding"])) == direct(bert, "mean", text)[0]
    tokens = AutoTokenizer.from_pretrained(bert)(TEXTS)["input_ids"]
    status, answer = cluster.embed(TEXTS)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    for one, expected in zip(answer["data"], direct(bert, "mean", *TEXTS), strict=True):
        assert one["embedding"] == pytest.approx(expected, abs=1e-5)
    status, answer = cluster.embed(tokens[:1])
    assert answer["data"][0]["embedding"] == pytest.approx(direct(bert, "mean", TEXTS[0])[0], abs=1e-6)
    status, answer = cluster.embed("dog " * 500)
    assert (status, answer["message"]) == (400, "input: an input has 502 tokens; the model's context length is 128")
    assert cluster.embed("dog " * 500, truncate_prompt_tokens=-1)[1]["usage"]["prompt_tokens"] == 128
    status, answer = cluster.embed("dog", dimensions=8)
    assert (status, answer["message"]) == (400, "dimensions: the model's embeddings have 64 dimensions, always")
    # With that of the warm-up.
    assert worker.metric("transformers:embedded_inputs_total") == 1 + 4 + 4 + 1 + 1
    assert cluster.chat()[0] == 404
    worker.stop()
