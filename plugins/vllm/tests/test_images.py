"""Images in requests, through the real frontend to a real model: what is in them, what is refused, what breaks."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from image_checks import (
    GREEN,
    RED,
    ask,
    body,
    check_answers,
    check_refusals,
    check_tokens,
    data_url,
    pictures,
    png,
    refused,
    text,
)

from dynamo_worker.testing import Cluster, Subject, eventually
from dynamo_worker.testing.client import Load
from dynamo_worker.testing.tiny_vision_model import make

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Frontends recognize the family by the name, and then route by images.
    return make(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def subject(subject: Subject, vision_model: Path) -> Subject:
    flags = ["--model", str(vision_model), *subject.flags[2:], "--limit-mm-per-prompt", '{"image": 3}']
    return replace(subject, flags=flags, start_seconds=300.0)


@pytest.mark.timeout(600)
def test_images(cluster: Cluster, vision_model: Path, tmp_path: Path) -> None:
    """One worker, behind a frontend that routes by images."""
    flags = ["--enable-multimodal", "--publish-kv-events", "--media-allow-network", "127.0.0.0/8"]
    cluster.start_frontend("--router-mode", "kv", DYN_MM_ALLOW_INTERNAL="1")
    (worker,) = cluster.serve(1, *flags, "--block-size", "32")
    with pictures(tmp_path / "pictures") as url:
        check_answers(cluster, vision_model, url)
        check_tokens(cluster)
        check_refusals(cluster, url)
    check_prepared_in_vain(cluster)
    worker.stop()


def check_prepared_in_vain(cluster: Cluster) -> None:
    """An image that was prepared for a request that vLLM then refuses is there for the next one."""
    green = data_url(png(GREEN))
    shorter = ask(cluster, "fox " * 2000, max_tokens=1)["usage"]["prompt_tokens"]
    # With the tokens of the image the prompt is too long, which only vLLM can tell.
    status, answer = refused(cluster, "fox " * (2000 + 2040 - shorter), green, max_tokens=1)
    assert (status, "maximum model length" in str(answer)) == (400, True), answer
    assert text(ask(cluster, "What? ", green))


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
    second.stop()
