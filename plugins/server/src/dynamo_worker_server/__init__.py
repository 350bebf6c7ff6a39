"""Any OpenAI-compatible server as an engine of dynamo-worker."""
