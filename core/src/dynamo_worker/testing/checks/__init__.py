"""The checks of the conformance suite, one kind per module; :mod:`dynamo_worker.testing.conformance` joins them."""
