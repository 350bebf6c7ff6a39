"""What the benchmarks share: the peer's environment, processes, load, measurements and reports."""
