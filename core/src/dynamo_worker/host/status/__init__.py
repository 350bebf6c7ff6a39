"""The status server: probes, control routes and metrics."""
