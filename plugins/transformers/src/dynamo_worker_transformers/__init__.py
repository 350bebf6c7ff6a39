"""Hugging Face's transformers as an engine of dynamo-worker."""
