"""Errors of a running engine that its callers tell apart."""


class QueueFullError(Exception):
    """The queue is at its limit; the request may be sent again later."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(RuntimeError):
    """The engine has ended; nothing more can run."""
