"""The worker in the cluster: the Dynamo runtime, and the registration of the worker and its model."""
