"""The collector that a server feeds with the metrics of finished requests and with the statistics of iterations."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge


class MetricsCollector:
    """A few of the real collector's metrics, under their names."""

    labelname_finish_reason = "finished_reason"

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        names = list(labels)
        self._finished = Counter("trtllm_request_success_total", "Finished requests", [*names, "finished_reason"])
        self._prompt = Counter("trtllm_prompt_tokens_total", "Prompt tokens", names)
        self._generated = Counter("trtllm_generation_tokens_total", "Generated tokens", names)
        self._running = Gauge("trtllm_num_requests_running", "Active requests", names)
        self._waiting = Gauge("trtllm_num_requests_waiting", "Queued requests", names)

    def log_request_metrics_dict(self, metrics_dict: dict[str, Any]) -> None:
        """Count one finished request; needs `return_perf_metrics`, without which there is no reason to count by."""
        reason = metrics_dict.get(self.labelname_finish_reason)
        if reason:
            self._finished.labels(**self.labels, finished_reason=reason).inc()
            self._prompt.labels(**self.labels).inc(metrics_dict.get("prompt_tokens", 0))
            self._generated.labels(**self.labels).inc(metrics_dict.get("generation_tokens", 0))

    log_metrics_dict = log_request_metrics_dict

    def log_iteration_stats(self, iteration_stats: dict[str, Any]) -> None:
        """Take the statistics of one iteration."""
        self._running.labels(**self.labels).set(iteration_stats["numActiveRequests"])
        self._waiting.labels(**self.labels).set(iteration_stats["numQueuedRequests"])
