"""SGLang as an engine of dynamo-worker."""
