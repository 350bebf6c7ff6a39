"""Operations and flags that touch what requests or operators name: SGLang itself is not started."""

from __future__ import annotations

import argparse
import asyncio
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import EngineContext, StartError
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.control import Control
from dynamo_worker_sglang.plugin import plugin


class Manager:
    """What the operations ask of SGLang."""

    enable_lora = False
    is_pause = False
    lora_ref_cache: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def update_weights_from_disk(self, request: Any) -> tuple[bool, str]:
        self.calls.append(request.model_path)
        return True, "updated"

    async def stop_profile(self) -> None:
        self.calls.append("stopped")

    async def start_profile(self, request: Any) -> None:
        self.calls.append(request.output_dir)

    async def is_locked(self) -> bool:
        return False

    @property
    def model_update_lock(self) -> Manager:
        return self

    async def end_requests(self, error: BaseException) -> None:
        self.calls.append(error)

    async def flush_cache(self, *timeout: float | None) -> SimpleNamespace:
        self.calls.extend(timeout)
        return SimpleNamespace(success=True, message="")


def operate(name: str, body: dict[str, Any], paths: AllowedPaths) -> tuple[dict[str, Any], list[Any]]:
    """Return the answer of an operation, and what reached SGLang."""
    manager = Manager()
    context = EngineContext("test.backend", Path("/nowhere"), supervised=False, allowed_paths=paths)
    control = Control(manager, context, ("tiny",))  # type: ignore[arg-type]
    answer = asyncio.run(control.routes()[name](body))
    return answer, manager.calls


@pytest.mark.parametrize("timeout", [None, 0, 2.5, 600])
def test_a_flush_waits_as_long_as_it_is_told(timeout: float | None) -> None:
    answer, calls = operate("flush_cache", {"timeout_s": timeout}, AllowedPaths())
    assert (answer["status"], calls) == ("success", [timeout])


@pytest.mark.parametrize("timeout", [-1, 601, 1e12, float("nan"), True, "5", [5]])
def test_a_flush_does_not_wait_for_ever(timeout: Any) -> None:
    answer, calls = operate("flush_cache", {"timeout_s": timeout}, AllowedPaths())
    assert (answer["status"], calls) == ("error", [])
    assert "from 0 to 600" in answer["message"]


@pytest.mark.parametrize(("name", "key"), [("update_weights_from_disk", "model_path"), ("start_profile", "output_dir")])
def test_paths_are_those_that_the_operator_allows(name: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "root" / "y").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    root = str(tmp_path / "root")
    answer, calls = operate(name, {key: f"{root}/x/../y"}, AllowedPaths([root], [root]))
    assert answer["status"] == "success"
    assert calls == [f"{root}/y"]
    for path in ("/", f"{root}/..", f"{root}/link", "org/model"):
        answer, calls = operate(name, {key: path}, AllowedPaths([root], [root]))
        assert "not below a directory" in answer["message"]
        assert not calls
    answer, calls = operate(name, {key: root}, AllowedPaths())
    assert "-root DIR allows a directory" in answer["message"]
    assert not calls


def test_where_profiles_go_unless_the_request_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = AllowedPaths(write=[str(tmp_path)])
    monkeypatch.delenv("SGLANG_TORCH_PROFILER_DIR", raising=False)
    answer, calls = operate("start_profile", {}, paths)
    assert "'/tmp' is not below" in answer["message"]
    assert not calls
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    assert operate("start_profile", {}, paths)[1] == [str(tmp_path)]


@pytest.mark.parametrize(
    "body", [{"profile_prefix": "../x"}, {"profile_id": "a/b"}, {"profile_id": 3}, {"output_dir": 3}]
)
def test_names_of_profiles_lead_nowhere_else(body: dict[str, Any], tmp_path: Path) -> None:
    answer, calls = operate("start_profile", {"output_dir": str(tmp_path), **body}, AllowedPaths(write=[str(tmp_path)]))
    assert answer["status"] == "error"
    assert not calls


@pytest.mark.parametrize(
    "flags",
    [
        ("--api-key", "secret"),
        ("--admin-api-key", "secret"),
        ("--ssl-keyfile", "k", "--ssl-certfile", "c"),
        ("--enable-cache-report",),
        ("--chat-template", "t"),
    ],
)
def test_flags_that_nobody_reads_are_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    with pytest.raises(StartError) as raised:
        arguments.configure(parser.parse_args(["--model-path", "m", *flags]), tmp_path)
    message = str(raised.value)
    assert "no effect in a worker" in message
    assert all(flag in message for flag in flags if flag.startswith("--"))
    assert "secret" not in message


def test_no_flag_is_refused_that_nobody_has_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    server_args = arguments._server_args()
    made = SimpleNamespace(add_cli_args=server_args.add_cli_args, from_cli_args=lambda args: args)
    monkeypatch.setattr(arguments, "_server_args", lambda: made)
    assert arguments.configure(parser.parse_args(["--model-path", "m"]), tmp_path).model_path == "m"


def test_the_plugin_names_what_there_is() -> None:
    for path in (plugin.engine, plugin.headless_engine, plugin.arguments, plugin.preload):
        assert callable(pkgutil.resolve_name(path))
