"""TensorRT-LLM as an engine of dynamo-worker."""
