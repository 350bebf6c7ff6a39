"""Executors: the main process's side of the engine and the ranks' side."""

from .executor import GenerationExecutor
from .proxy import GenerationExecutorProxy
from .request import DEFAULT_REQUEST_PRIORITY, GenerationRequest, LoRARequest
from .result import CompletionOutput, GenerationResult, IterationResult, Logprob
from .utils import EngineDeadError, RequestError
from .worker import GenerationExecutorWorker

__all__ = [
    "DEFAULT_REQUEST_PRIORITY",
    "CompletionOutput",
    "EngineDeadError",
    "GenerationExecutor",
    "GenerationExecutorProxy",
    "GenerationExecutorWorker",
    "GenerationRequest",
    "GenerationResult",
    "IterationResult",
    "LoRARequest",
    "Logprob",
    "RequestError",
]
