"""What a client is told where something is raised."""

import logging

from ..errors import RequestError


def as_request_error(error: Exception) -> RequestError:
    """The answer to an exception. Logs one that the request did not cause."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, RecursionError):
        return RequestError(400, "the request is nested too deeply")
    logging.error("a request failed", exc_info=error)
    return RequestError(500, f"this request failed: {type(error).__name__}: {error}")
