"""vLLM as an engine of dynamo-worker."""
