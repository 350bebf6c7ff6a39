"""The worker in the cluster: the Dynamo runtime, what it registers, and keeping that registered."""
