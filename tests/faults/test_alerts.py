"""Every alert of deploy/monitoring fires: real faults are recorded from /metrics, and promtool judges the recording."""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dynamo_worker.testing import Worker, eventually

from .conftest import FaultyCluster
from .test_slow_clients import Unread, unread  # noqa: F401 -- a fixture

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)

RULES = Path(__file__).parents[2] / "deploy" / "monitoring" / "alerts.yaml"
#: Seconds between two values, as in deploy/monitoring/podmonitor.yaml.
INTERVAL = 15
#: Values before the fault: longer than every range of a rule.
BEFORE = 2 * 60 * 60 // INTERVAL
#: What Prometheus adds to every series.
TARGET = {"instance": "10.0.0.7:9090", "job": "monitoring/dynamo-worker", "namespace": "llm", "pod": "worker-0"}
ALERTS = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["spec"]["groups"] for rule in group["rules"]}

Series = dict[str, float]


def scrape(worker: Worker) -> Series:
    """Return what Prometheus would store of a scrape: the value of every series."""
    connection = http.client.HTTPConnection("127.0.0.1", worker.status_port, timeout=5)
    series: Series = {}
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status == 200:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    # promtool's clock starts with 0.
                    stamped = sample.name.endswith("_timestamp_seconds") and sample.value
                    value = sample.value - time.time() + BEFORE * INTERVAL if stamped else sample.value
                    series[_name(sample.name, {**sample.labels, **TARGET})] = value
    series[_name("up", TARGET)] = float(bool(series))
    return series


def _name(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ", ".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "}"


def fires(alert: str, directory: Path, before: Series, *during: Series, last: float) -> None:
    """Check that an alert is silent before a fault and fires during it.

    :param during: scrapes of the fault; the last one stays for ``last`` seconds.
    """
    scrapes = [before] * BEFORE + [*during] + [during[-1]] * math.ceil(last / INTERVAL)
    names = {name for scraped in scrapes for name in scraped if name.startswith(("dynamo_worker_", "up{"))}
    values = {name: " ".join(f"{scraped[name]:g}" if name in scraped else "_" for scraped in scrapes) for name in names}
    rules, test = directory / "rules.yaml", directory / "test.yaml"
    rules.write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    quiet, end = (BEFORE - 1) * INTERVAL, (len(scrapes) - 1) * INTERVAL
    case = {
        "interval": f"{INTERVAL}s",
        "input_series": [{"series": name, "values": text} for name, text in sorted(values.items())],
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{quiet}s", "exp_samples": []},
            {"expr": firing, "eval_time": f"{end}s", "exp_samples": [{"labels": "{}", "value": 1}]},
        ],
    }
    test.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "15s", "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", str(test)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., None]:
    def judge(alert: str, before: Series, *during: Series, last: float = 60) -> None:
        fires(alert, tmp_path, before, *during, last=last)

    return judge


@needs_promtool
def test_the_rules_are_valid(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    subprocess.run(["promtool", "check", "rules", "--lint-fatal", str(rules)], check=True)


@needs_promtool
def test_an_alert_that_does_not_fire_is_found(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    worker = faulty.serving()
    with pytest.raises(AssertionError, match="DynamoWorkerRequestsFail"):
        judged("DynamoWorkerRequestsFail", scrape(worker), scrape(worker), last=600)


@pytest.mark.slow
@needs_promtool
def test_requests_that_fail_and_a_blocked_loop(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    worker = faulty.serving("--stall-timeout", "0")
    faulty.cluster.ask()
    before = scrape(worker)
    assert "Internal server error" in faulty.cluster.ask(prompt="poison").error
    # A steady rate of failures: the last scrape is stretched, so it takes several that grow.
    during = [_grown(before, scrape(worker), factor) for factor in range(1, 20)]
    judged("DynamoWorkerRequestsFail", before, *during)
    before = scrape(worker)
    faulty.cluster.ask(prompt="nap")
    eventually(lambda: scrape(worker)[_lag()] > 1, 10, "the lag shows")
    judged("DynamoWorkerEventLoopBlocked", before, scrape(worker))


def _lag() -> str:
    return _name("dynamo_worker_event_loop_lag_seconds", TARGET)


def _grown(before: Series, after: Series, factor: int) -> Series:
    """Return what the counters show if what happened once happens ``factor`` times."""
    return {name: before.get(name, 0) + factor * (value - before.get(name, 0)) for name, value in after.items()}


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize(
    ("kind", "alert", "last"),
    [("raise", "DynamoWorkerHealthChecksFail", 60), ("slow", "DynamoWorkerHealthChecksSlow", 0)],
)
def test_health_checks(faulty: FaultyCluster, judged: Callable[..., None], kind: str, alert: str, last: float) -> None:
    worker = faulty.serving("--hook-fault", f"check_health={kind}", "--health-check-interval", "0.2")
    before = scrape(worker)
    name = "dynamo_worker_health_check_failures_total" if kind == "raise" else "dynamo_worker_health_check_seconds_sum"
    eventually(lambda: scrape(worker)[_name(name, TARGET)] > before[_name(name, TARGET)], 20, "a check")
    # Checks go on: ten minutes of the same.
    during = [_grown(before, scrape(worker), factor) for factor in range(1, 80)]
    judged(alert, before, *during, last=last)


@pytest.mark.slow
@needs_promtool
def test_out_of_discovery(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    worker = faulty.serving()
    before = scrape(worker)
    for entry in Path(faulty.cluster.discovery).rglob("*"):
        if entry.is_file():
            entry.unlink()
    ready = _name("dynamo_worker_ready", TARGET)
    assert before[ready] == 1
    eventually(lambda: scrape(worker)[ready] == 0, 10, "it notices")
    judged("DynamoWorkerNotReady", before, {**before, ready: 0.0}, last=90)


@pytest.mark.slow
@needs_promtool
def test_restarts_and_down(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    """A worker that dies again and again, and has no metrics while it starts."""
    lives: list[Series] = []
    for _ in range(3):
        worker = faulty.serving()
        lives.append(scrape(worker))
        faulty.cluster.ask(prompt="dead")
        worker.wait_gone()
    gone = scrape(worker)
    assert list(gone.values()) == [0.0]
    judged("DynamoWorkerRestarts", lives[0], *lives[1:])
    judged("DynamoWorkerDown", lives[2], gone, last=16 * 60)


@pytest.mark.slow
@needs_promtool
def test_a_shutdown_that_does_not_end(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    worker = faulty.serving("--hook-fault", "drain=hang", "--termination-grace-period", "20")
    before = scrape(worker)
    worker.signal(signal.SIGTERM)
    deadline = _name("dynamo_worker_shutdown_deadline_timestamp_seconds", TARGET)
    during: Series = {}

    def has_a_deadline() -> bool:
        during.update(scrape(worker))
        return during[deadline] > 0

    eventually(has_a_deadline, 5, "a deadline")
    judged("DynamoWorkerShutdownOverdue", before, during, last=120)


@pytest.mark.slow
@needs_promtool
def test_left_drained(faulty: FaultyCluster, judged: Callable[..., None]) -> None:
    worker = faulty.serving()
    before = scrape(worker)
    assert worker.operate("control/drain", {"grace_period": 0, "budget": 60})["status"] == "success"
    drained = _name("dynamo_worker_drain_phase", {**TARGET, "phase": "drained"})
    eventually(lambda: scrape(worker)[drained] == 1, 10, "it is drained")
    judged("DynamoWorkerLeftDrained", before, scrape(worker), last=3700)


@pytest.mark.slow
@needs_promtool
def test_slow_clients(faulty: FaultyCluster, unread: Unread, judged: Callable[..., None]) -> None:  # noqa: F811
    worker = faulty.serving("--tokens-per-second", "2000")
    before = scrape(worker)
    unread(11)
    slow = _name("dynamo_worker_slow_clients", TARGET)
    eventually(lambda: scrape(worker)[slow] == 11, 60, "all are slow")
    judged("DynamoWorkerSlowClients", before, scrape(worker), last=400)


def test_every_alert_has_its_fault() -> None:
    assert set(re.findall(r'"(DynamoWorker\w+)"', Path(__file__).read_text())) == ALERTS
