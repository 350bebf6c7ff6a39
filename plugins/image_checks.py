"""What images in requests have to do on every engine that takes some, and clients that send them."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from PIL import Image

from dynamo_worker.testing import Cluster, eventually
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.cluster import post
from dynamo_worker.testing.tiny_vision_model import TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RED, GREEN, BLUE = (255, 0, 0), (10, 200, 30), (0, 0, 255)


def png(color: tuple[int, int, int], size: int = 60) -> bytes:
    """Return the file of an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def data_url(file: bytes) -> str:
    """Return a PNG as a URL."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def content(*parts: str) -> list[dict[str, Any]]:
    """Return the content of a message: URLs are images, and everything else is text."""
    urls = ("data:", "http:", "file:")
    return [
        {"type": "image_url", "image_url": {"url": part}} if part.startswith(urls) else {"type": "text", "text": part}
        for part in parts
    ]


def body(*parts: str, max_tokens: int = 8, **options: Any) -> dict[str, Any]:
    """Return the body of a chat request with one message; see :func:`content`."""
    found = chat("tiny", "", max_tokens, **options)
    found["messages"] = [{"role": "user", "content": content(*parts)}]
    return found


def ask(cluster: Cluster, *parts: str, **options: Any) -> Any:
    """Return the answer to a message with images, which must be one."""
    status, answer = refused(cluster, *parts, **options)
    assert status == 200, answer
    return answer


def refused(cluster: Cluster, *parts: str, **options: Any) -> tuple[int, Any]:
    """Return the HTTP status and the answer to a message with images."""
    asked = body(*parts, stream=False, **options)
    return post(f"{cluster.url}/v1/chat/completions", asked)


def text(answer: Any) -> str:
    """Return the text of an answer."""
    found: str = answer["choices"][0]["message"]["content"]
    return found


@contextlib.contextmanager
def pictures(folder: Path) -> Iterator[str]:
    """Serve two images from a new folder, and return its URL."""
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


def check_answers(cluster: Cluster, model: Path, pictures: str) -> None:
    """What is in the images makes the answer, in their order, wherever they come from."""
    red, blue = data_url(png(RED)), data_url(png(BLUE))
    expected = by_transformers(model, "user: What? <image>\nassistant:", [RED], 8)
    assert text(ask(cluster, "What? ", red)) == expected
    assert text(ask(cluster, "What? ", f"{pictures}/red.png")) == expected
    assert text(ask(cluster, "What? ", blue)) != expected
    expected = by_transformers(model, "user: <image> or <image>?\nassistant:", [RED, BLUE], 8)
    assert text(ask(cluster, red, " or ", blue, "?")) == expected
    assert text(ask(cluster, blue, " or ", f"{pictures}/red.png", "?")) != expected
    assert text(ask(cluster, "Text?"))


def check_tokens(cluster: Cluster) -> None:
    """The tokens of an image count, and its keys and values are found again by what is in it."""
    red, new = data_url(png(RED)), data_url(png((200, 200, 0)))
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    one, two = (ask(cluster, prompt, *images)["usage"]["prompt_tokens"] for images in ((), (red,)))
    assert two == one + TOKENS, (one, two)
    again, other = (ask(cluster, prompt, image)["usage"]["prompt_tokens_details"] for image in (red, new))
    assert again["cached_tokens"] > other["cached_tokens"] > 0, (again, other)


def check_refusals(cluster: Cluster, pictures: str) -> None:
    """What is wrong with a request is told to its client, and harms nobody else."""
    red = data_url(png(RED))
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
    # Placeholders in the text of a client are no images.
    status, answer = refused(cluster, "What is <image> in a text? ", red)
    assert status in (200, 400), answer
    status, answer = refused(cluster, "What is <image> in a text?")
    assert status in (200, 400), answer
    assert text(ask(cluster, "What? ", red))
    assert all(result.ok for result in load.wait()), load.results
