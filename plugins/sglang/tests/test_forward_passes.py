"""Forward-pass metrics: what SGLang is told, and the timer for its forward passes on a CPU. SGLang is not started."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.observability import forward_pass_metrics
from sglang.srt.utils import device_timer

from dynamo_worker_sglang import arguments, processes, scheduler
from dynamo_worker_sglang.scheduler import HostInterval


@pytest.mark.parametrize(
    ("flags", "environment", "enabled"),
    [
        ((), {}, False),
        ((), {"DYN_FORWARDPASS_METRIC_PORT": "1"}, True),
        (("--fpm-trace",), {"DYN_FPM_TRACE": "0"}, True),
        (("--enable-forward-pass-metrics",), {}, True),
    ],
)
def test_who_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...], environment: dict[str, str], enabled: bool
) -> None:
    for name in ("DYN_FORWARDPASS_METRIC_PORT", "DYN_FPM_TRACE"):
        monkeypatch.setenv(name, environment.get(name, ""))
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    args = parser.parse_args(["--model-path", "m", *flags])
    arguments.measure_forward_passes(args, 123, tmp_path)
    assert args.enable_forward_pass_metrics is enabled
    found = (args.forward_pass_metrics_worker_id, args.forward_pass_metrics_ipc_name)
    assert found == (("123", f"ipc://{tmp_path}/forward-passes") if enabled else ("", None))


@pytest.mark.parametrize(("device", "timer"), [("cpu", HostInterval), ("cuda", device_timer._TimingInterval)])
def test_a_cpu_has_no_events_to_measure_with(monkeypatch: pytest.MonkeyPatch, device: str, timer: Any) -> None:
    monkeypatch.setattr(device_timer, "_TimingInterval", device_timer._TimingInterval)
    monkeypatch.setattr(scheduler.rendezvous, "listen_on_loopback", lambda: None)
    monkeypatch.setattr(scheduler, "run_scheduler_process", lambda *_: None)
    scheduler.run(argparse.Namespace(device=device), "ports")
    assert device_timer._TimingInterval is timer


def test_sglangs_timer_measures_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_timer, "_TimingInterval", HostInterval)
    measured: list[Any] = []
    timer = device_timer.DeviceTimer(lambda t, **metadata: measured.append((t, metadata)))
    with timer.wrap({"category": "decode"}):
        time.sleep(0.05)
    ((seconds, metadata),) = measured
    assert 0.05 <= seconds < 1
    assert metadata == {"category": "decode"}


def test_the_format_is_that_of_dynamos_own_worker() -> None:
    recorded = json.loads((Path(__file__).parents[3] / "tests" / "unit" / "data" / "forward_passes.json").read_text())
    for each in recorded:
        assert (
            forward_pass_metrics.encode(forward_pass_metrics.decode(bytes.fromhex(each["encoded"]))).hex()
            == each["encoded"]
        )


def test_what_is_set_for_the_trace_does_not_restart_a_preloaded_process() -> None:
    """Its imports do not depend on it."""
    assert "DYN_FPM_TRACE" in processes._HARMLESS
