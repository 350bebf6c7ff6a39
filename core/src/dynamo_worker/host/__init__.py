"""The worker process: everything between the command line and the engine that plugins never import."""
