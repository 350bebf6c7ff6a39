"""The page of `dynamo-worker explain --html` in a real browser, made from the record of a real end."""

from __future__ import annotations

import json
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


class Browser:
    """Renders pages, and tells what they asked for and complained of."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self.picture = directory / "page.png"

    def show(self, page: Path, *more: str) -> tuple[list[str], set[str]]:
        """Render a page; return its messages on the console and the addresses that it requested."""
        log = self._directory / "net.json"
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync",
            f"--user-data-dir={self._directory / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
            "--window-size=1100,1600", f"--screenshot={self.picture}", *more, page.as_uri(),
        ]  # fmt: skip
        result = subprocess.run([self._program, *options], capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return [line for line in result.stderr.splitlines() if "CONSOLE" in line], requests_of_pages(log)


def requests_of_pages(log: Path) -> set[str]:
    """Return the addresses that pages requested, by a network log of Chromium, which may lack its end.

    The browser has requests of its own, for updates: those have no origin.
    """
    text = log.read_text().rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except ValueError:
        events = json.loads(text + "]}")["events"]
    found = set()
    for event in events:
        params = event.get("params")
        if isinstance(params, dict) and "url" in params and params.get("initiator", "not an origin") != "not an origin":
            found.add(str(params["url"]))
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_renders_without_a_network_and_without_errors(
    cluster: Cluster, tmp_path: Path, browser: str, theme: str
) -> None:
    page, spoiled = tmp_path / "page.html", tmp_path / "spoiled.html"
    worker = cluster.worker("--process-tree", "--grace-period", "0.5")
    worker.signal(signal.SIGKILL, worker.engine_process("echo_process:Core"))
    assert worker.wait_gone() == 1
    made = cluster.run("explain", "--html", str(page))
    assert made.returncode == 0, made.stderr
    shown = Browser(browser, tmp_path)
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    assert shown.show(page, *dark) == ([], set())
    assert size_of(shown.picture) == (1100, 1600)
    assert shown.picture.stat().st_size > 40_000, "a blank page compresses to less"
    # The same with a page that does both, or this test could not fail.
    address = "http://127.0.0.1:9/picture.png"
    text = page.read_text().replace("default-src 'none'", "default-src * 'unsafe-inline'")
    spoiled.write_text(text.replace("</main>", f"<img src='{address}'><script>console.error(1)</script></main>"))
    said, requested = shown.show(spoiled)
    assert said
    assert requested == {address}
