"""`dynamo-worker top`: the workers of a namespace, live in a terminal."""
