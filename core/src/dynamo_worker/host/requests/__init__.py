"""The request path: from the Dynamo runtime to the engine and back to the client."""
