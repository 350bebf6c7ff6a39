"""The OpenAI HTTP frontend: the command, and its process beside a worker."""
