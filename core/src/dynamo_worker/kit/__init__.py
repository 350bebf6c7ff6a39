"""What engine plugins build on: nothing in here knows the worker process (``host``), which in turn knows none of it."""
