"""Monitors of a serving worker: engine health and progress, processes, threads, the event loop."""
