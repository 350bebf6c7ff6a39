"""The engine that runs in each rank."""
