"""The page of `dynamo-worker explain --html` in a real browser, made from the record of a real end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from dynamo_worker.testing import Cluster

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def browser() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    return found


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_renders_without_a_network_and_without_errors(
    cluster: Cluster, tmp_path: Path, browser: str, theme: str
) -> None:
    worker = cluster.worker("--process-tree", "--grace-period", "0.5")
    worker.signal(signal.SIGKILL, worker.engine_process("echo_process:Core"))
    assert worker.wait_gone() == 1
    page, picture, net = tmp_path / "page.html", tmp_path / "page.png", tmp_path / "net.json"
    made = cluster.run("explain", "--html", str(page))
    assert made.returncode == 0, made.stderr
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net}", "--enable-logging=stderr",
        "--window-size=1100,1600", f"--screenshot={picture}", *dark, page.as_uri(),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    result = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    assert size_of(picture) == (1100, 1600)
    assert picture.stat().st_size > 40_000, "a blank page compresses to less"
    requested = {url for url in urls(net) if page.name in url or not url.startswith(("chrome", "data:"))}
    assert {url for url in requested if not url.startswith("file:")} == set()


def urls(log: Path) -> set[str]:
    """Return the addresses in a network log of Chromium, which a browser that is killed leaves without an end."""
    text = log.read_text().rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except ValueError:
        events = json.loads(text + "]}")["events"]
    return {
        str(event["params"]["url"])
        for event in events
        if isinstance(event.get("params"), dict) and "url" in event["params"]
    }
