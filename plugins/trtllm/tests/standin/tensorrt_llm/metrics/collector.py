"""The collector that a server feeds with the metrics of finished requests."""

from __future__ import annotations

from typing import Any

try:
    from prometheus_client import Counter
except ImportError:
    Counter = None  # type: ignore[assignment, misc]


class MetricsCollector:
    """Count finished requests by finish reason, where `prometheus_client` is installed."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self._finished: Any = None
        if Counter is not None:
            self._finished = Counter(
                "trtllm_request_success", "Finished requests by reason", [*labels, "finished_reason"]
            )

    def log_metrics_dict(self, metrics_dict: dict[Any, Any]) -> None:
        """Count one finished request."""
        reason = next((value for key, value in metrics_dict.items() if "finish" in str(key).lower()), None)
        if reason is not None and self._finished is not None:
            self._finished.labels(**self.labels, finished_reason=str(reason)).inc()

    def log_request_metrics_dict(self, metrics_dict: dict[Any, Any]) -> None:
        """Count one finished request."""
        self.log_metrics_dict(metrics_dict)

    def log_iteration_stats(self, iteration_stats: dict[str, Any]) -> None:
        """Take the statistics of one iteration; the stand-in exports none of them."""
