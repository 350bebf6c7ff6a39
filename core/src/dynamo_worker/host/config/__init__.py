"""The worker's configuration: options, settings and where each value came from, and how a stop divides its time."""
