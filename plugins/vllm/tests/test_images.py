"""Images in requests, through the real frontend to a real model: what is in them, what is refused, what breaks."""

from __future__ import annotations

import base64
import functools
import io
import re
import signal
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from conftest import FLAGS, GPU_FLAGS
from dynamo_worker.testing import Cluster, Subject, eventually
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.tiny_vision_model import TOKENS, make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RED, GREEN, BLUE = (255, 0, 0), (10, 200, 30), (0, 0, 255)


def png(color: tuple[int, int, int], size: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def data_url(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode()


def content(*parts: str) -> list[dict[str, Any]]:
    """Return the content of a message: URLs are images, and everything else is text."""
    urls = ("data:", "http:", "file:")
    return [
        {"type": "image_url", "image_url": {"url": part}} if part.startswith(urls) else {"type": "text", "text": part}
        for part in parts
    ]


def body(*parts: str, max_tokens: int = 8, **options: Any) -> dict[str, Any]:
    found = chat("tiny", "", max_tokens, **options)
    found["messages"] = [{"role": "user", "content": content(*parts)}]
    return found


def ask(cluster: Cluster, *parts: str, **options: Any) -> Any:
    """Return the answer to a message with images, which must be one."""
    status, answer = refused(cluster, *parts, **options)
    assert status == 200, answer
    return answer


def refused(cluster: Cluster, *parts: str, **options: Any) -> tuple[int, Any]:
    return cluster.chat(**{**body(*parts, **options), "prompt": "", "stream": False})


def text(answer: Any) -> str:
    found: str = answer["choices"][0]["message"]["content"]
    return found


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Frontends recognize the family by the name, and then route by images.
    return make(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def subject(vision_model: Path) -> Subject:
    limit = ("--limit-mm-per-prompt", '{"image": 3}')
    return Subject(
        "vllm",
        ["--model", str(vision_model), *FLAGS, *GPU_FLAGS, *limit],
        model="tiny",
        start_seconds=300.0,
        processes={"core": r"VLLM::EngineCore", "worker": r"VLLM::Worker"},
        stream_tokens=1500,
        stall_timeout=10.0,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[str]:
    """Serve two images, and return the URL of their folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "red.png").write_bytes(png(RED))
    (folder / "blue.png").write_bytes(png(BLUE))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def by_transformers(model: Path, prompt: str, colors: list[tuple[int, int, int]], tokens: int) -> str:
    """Return the answer of the model itself."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model)
    reference = LlavaForConditionalGeneration.from_pretrained(model)
    inputs = processor(text=[prompt], images=[Image.new("RGB", (60, 60), color) for color in colors])
    inputs = inputs.convert_to_tensors("pt")
    output = reference.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answer: str = processor.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])
    return answer


@pytest.mark.timeout(600)
def test_images(cluster: Cluster, vision_model: Path, pictures: str) -> None:
    """One worker: the right answers, the limits, and what one bad request does to others."""
    flags = ["--enable-multimodal", "--publish-kv-events", "--media-allow-network", "127.0.0.0/8"]
    cluster.start_frontend("--router-mode", "kv")
    (worker,) = cluster.serve(1, *flags, "--block-size", "32")
    red, blue = data_url(png(RED)), data_url(png(BLUE))

    # What is in the images makes the answer, in their order, wherever they come from.
    expected = by_transformers(vision_model, "user: What? <image>\nassistant:", [RED], 8)
    first = ask(cluster, "What? ", red)
    assert text(first) == expected
    assert text(ask(cluster, "What? ", f"{pictures}/red.png")) == expected
    assert text(ask(cluster, "What? ", blue)) != expected
    expected = by_transformers(vision_model, "user: <image> or <image>?\nassistant:", [RED, BLUE], 8)
    assert text(ask(cluster, red, " or ", blue, "?")) == expected
    assert text(ask(cluster, blue, " or ", f"{pictures}/red.png", "?")) != expected
    assert text(ask(cluster, "Text?"))

    # The tokens of an image count, and its keys and values are found again by what is in it.
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    one, two = (ask(cluster, prompt, *images)["usage"]["prompt_tokens"] for images in ((), (red,)))
    assert two == one + TOKENS, (one, two)
    again, other = (ask(cluster, prompt, image)["usage"]["prompt_tokens_details"] for image in (red, blue))
    assert again["cached_tokens"] > other["cached_tokens"] > 0, (again, other)

    # What is wrong with a request is told to its client, and harms nobody else.
    load = Load(cluster.url, [body("Look: ", red, max_tokens=1000, stream=True)] * 2)
    eventually(load.started, 60, "the first tokens")
    for parts, message in (
        ((red, "?", data_url(png(RED)[:50])), "image 2 of 2"),
        (("?", "data:image/png;base64,AAAA"), "the image"),
        (("?", f"{pictures}/none.png"), "404"),
        ((red, red, red, red), "at most 3"),
        (("?", "http://169.254.169.254/latest/meta-data"), "--media-allow-network"),
        (("?", "file:///etc/passwd"), "--media-allow-path"),
    ):
        status, answer = refused(cluster, *parts)
        assert status == 400, (parts, answer)
        assert message in str(answer), (parts, answer)
    status, answer = cluster.chat(
        messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": f"{pictures}/v.mp4"}}]}]
    )
    assert (status, "video_url" in str(answer)) == (400, True), answer
    # An image that was prepared for a request that vLLM then refused is prepared again.
    green = data_url(png(GREEN))
    status, answer = refused(cluster, "word " * 2100, green)
    assert status == 400, answer
    status, answer = refused(cluster, "fox " * 500, green, prompt_logprobs=10)
    assert text(ask(cluster, "What? ", green))
    # Placeholders in the text of a client are no images.
    status, answer = refused(cluster, "What is <image> in a text? ", red)
    assert status in (200, 400), answer
    status, answer = refused(cluster, "What is <image> in a text?")
    assert status in (200, 400), answer
    assert text(ask(cluster, "What? ", red))
    assert all(result.ok for result in load.wait()), load.results
    worker.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_flag(cluster: Cluster) -> None:
    """Text is served, and images are refused by name."""
    (worker,) = cluster.serve(1)
    assert text(ask(cluster, "Text?"))
    status, answer = refused(cluster, "What? ", data_url(png(RED)))
    assert (status, "--enable-multimodal" in str(answer)) == (400, True), answer
    worker.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_without_images(cluster: Cluster, tiny_model: Path) -> None:
    """The operator is told at the start, the client with its request."""
    worker = cluster.worker("--enable-multimodal", "--model", str(tiny_model))
    assert "The model takes no images" in worker.log
    worker.stop()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("end", ["SIGTERM", "the engine is killed"])
def test_requests_with_images_go_on_elsewhere(cluster: Cluster, end: str) -> None:
    """A worker that stops or whose engine dies hands its requests over, with their images."""
    first, second = cluster.serve(2, "--enable-multimodal", "--grace-period", "0", "--drain", "handoff")
    image = data_url(png(RED))
    alone = text(ask(cluster, "Look: ", image, max_tokens=600))
    load = Load(cluster.url, [body("Look: ", image, max_tokens=600)] * 6)
    eventually(load.started, 120, "the first tokens")
    if end == "SIGTERM":
        first.signal(signal.SIGTERM)
        assert first.wait_gone(60) == 0
    else:
        first.signal(signal.SIGKILL, first.child(r"VLLM::EngineCore"))
        assert first.wait_gone(60) == 1
    assert {(result.ok, result.text) for result in load.wait(240)} == {(True, alone)}, load.results
    assert re.search(r"Worker ready", second.log)
    second.stop()
