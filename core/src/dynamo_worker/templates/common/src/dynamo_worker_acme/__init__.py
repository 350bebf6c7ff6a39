"""The acme engine as a plugin of dynamo-worker."""
