"""The kit that engine plugins build on. It does not depend on the worker process (``host``), nor the host on it."""
