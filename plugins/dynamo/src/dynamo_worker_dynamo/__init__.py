"""Engine classes of Dynamo's own ``LLMEngine`` protocol as engines of dynamo-worker."""
