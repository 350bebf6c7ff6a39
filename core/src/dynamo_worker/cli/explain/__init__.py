"""`dynamo-worker explain`: the end of a worker, from its flight record."""
