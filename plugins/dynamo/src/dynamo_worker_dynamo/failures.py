"""What an error of an engine class means for the worker: a mistake of the client, the end of the engine, or neither."""

from __future__ import annotations

from typing import Final

from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument

from dynamo_worker import EngineDeadError, InvalidRequestError
from dynamo_worker.errors import describe
from dynamo_worker.kit import device_errors

#: Names of errors with which engines say that they are dead; vLLM's is ``vllm.v1.engine.exceptions.EngineDeadError``.
_DEAD: Final = frozenset({"EngineDeadError", "EngineShutdown"})
_CLIENT_ERRORS: Final = range(400, 500)


def translated(error: Exception) -> Exception:
    """Return an error of an engine class as the worker knows it.

    Errors that mean a lost connection, such as ``Disconnected``, stay as they are: with them the request migrates, as
    in Dynamo's own worker. All others, ``ValueError`` included, are bugs: HTTP 500 and a traceback in the log.
    """
    if isinstance(error, (EngineDeadError, InvalidRequestError)):
        return error
    if isinstance(error, InvalidArgument):
        return InvalidRequestError(str(error))
    if isinstance(error, HttpError) and error.code in _CLIENT_ERRORS:
        return InvalidRequestError(error.message)
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, EngineShutdown) or names & _DEAD or device_errors.is_gone(str(error)):
        return EngineDeadError(f"the engine class has reported its end: {describe(error)}")
    return error
