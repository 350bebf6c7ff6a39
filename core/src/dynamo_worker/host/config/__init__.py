"""The worker's configuration: options, settings and their origins, and the shutdown timeline."""
