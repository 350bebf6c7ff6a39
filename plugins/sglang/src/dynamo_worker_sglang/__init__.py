"""SGLang as an engine of dynamo-worker."""

__version__ = "0.1.0"
