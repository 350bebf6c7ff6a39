"""Prometheus metrics of requests."""

from __future__ import annotations

from tensorrt_llm.metrics.collector import MetricsCollector

__all__ = ["MetricsCollector"]
