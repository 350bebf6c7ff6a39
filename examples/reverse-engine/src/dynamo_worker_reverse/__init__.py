"""The reverse engine as a plugin of dynamo-worker: an example of an engine that is published separately."""
