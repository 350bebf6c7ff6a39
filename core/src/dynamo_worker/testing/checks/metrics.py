"""Checks of an engine's Prometheus metrics."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_worker.engine import HasMetrics
from dynamo_worker.kit.metrics import ComponentCollector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from dynamo_worker.testing.trial import Trial

#: Prefixes of the worker's and of the runtime's own metrics.
_TAKEN = ("dynamo_worker_", "dynamo_component_", "dynamo_frontend_")
#: Those that the kit offers to engines.
_OFFERED = frozenset(family.name for family in ComponentCollector(0.0, {}, dict).collect())


def _text(trial: Trial) -> str:
    engine = trial.engine
    if not isinstance(engine, HasMetrics):
        trial.skip("the engine has no metrics")
    registry = engine.metrics_registry()
    trial.expect(isinstance(registry, CollectorRegistry), f"metrics_registry returned {registry!r:.80}", _at(trial))
    try:
        return generate_latest(registry).decode()
    except Exception as error:
        raise trial.finding(f"collecting the metrics raised {error!r}", _at(trial)) from error


def _families(trial: Trial) -> list[Metric]:
    text = _text(trial)
    try:
        return list(text_string_to_metric_families(text))
    except ValueError as error:
        raise trial.finding(f"the metrics cannot be parsed: {error}", _at(trial)) from error


def _at(trial: Trial) -> object:
    return getattr(trial.engine, "metrics_registry", None)


def _counters(trial: Trial) -> list[Metric]:
    return [family for family in _families(trial) if family.type == "counter"]


class MetricsChecks:
    """``metrics_registry``."""

    def test_metrics_can_be_collected(self, trial: Trial) -> None:
        """A collector that raises makes ``/metrics`` of the whole worker fail: the operator is blind."""
        _text(trial)

    def test_metrics_can_be_parsed(self, trial: Trial) -> None:
        """Prometheus drops a whole scrape for one line that it cannot read."""
        _families(trial)

    def test_each_series_is_there_once(self, trial: Trial) -> None:
        """Prometheus refuses a scrape in which a series comes twice."""
        seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        for family in _families(trial):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                trial.expect(key not in seen, f"{sample.name}{sample.labels} comes twice", _at(trial))
                seen.add(key)

    def test_values_are_numbers(self, trial: Trial) -> None:
        """A NaN makes every sum and every alert over it silent."""
        for family in _families(trial):
            if family.type in ("counter", "gauge"):
                for sample in family.samples:
                    number = sample.value == sample.value
                    trial.expect(number, f"{sample.name}{sample.labels} is {sample.value}", _at(trial))

    def test_metrics_do_not_take_the_workers_names(self, trial: Trial) -> None:
        """The worker's own metrics are beside them: the same name twice breaks dashboards and scrapes."""
        for family in _families(trial):
            taken = family.name.startswith(_TAKEN) and family.name not in _OFFERED
            trial.expect(not taken, f"{family.name} is a name of the worker", _at(trial))

    def test_names_of_metrics_are_conventional(self, trial: Trial) -> None:
        """Other characters need quoting in every query."""
        for family in _families(trial):
            right = re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", family.name)
            trial.expect(right, f"the metric is called {family.name!r}", _at(trial))

    def test_collecting_is_quick(self, trial: Trial) -> None:
        """Metrics are collected on every scrape, in the process that serves."""
        _text(trial)
        started = time.monotonic()
        _text(trial)
        seconds, limit = time.monotonic() - started, 0.2 * trial.subject.patience
        trial.expect(seconds < limit, f"collecting took {seconds:.2f} s; at most {limit}", _at(trial))

    def test_counters_do_not_decrease(self, trial: Trial) -> None:
        """Prometheus takes a smaller counter for a restart and shows a burst that never was."""
        before = {s.name + repr(sorted(s.labels.items())): s.value for f in _counters(trial) for s in f.samples}
        trial.answer(3)
        for family in _counters(trial):
            for sample in family.samples:
                last = before.get(sample.name + repr(sorted(sample.labels.items())), 0.0)
                trial.expect(sample.value >= last, f"{sample.name} went from {last} to {sample.value}")
