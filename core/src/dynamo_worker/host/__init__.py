"""The worker process: everything between the command line and the engine. Plugins import none of it."""
