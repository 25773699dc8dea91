"""The exception tree. Every message says what was seen, what was expected and what to change."""


class JaxServeError(Exception):
    """Base of every error that jaxserve raises on purpose."""


class ConfigError(JaxServeError, ValueError):
    """A setting that cannot work: an impossible memory budget, an unknown option."""


class CheckpointError(JaxServeError, ValueError):
    """A model folder that cannot be served: missing shard, wrong shape, unknown architecture."""


class RequestError(JaxServeError, ValueError):
    """One request that cannot be honoured; the server answers 4xx and goes on.

    Args:
        message: what was seen, what was expected and the remedy.
        param: the request field at fault, as the user spelled it.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class EngineError(JaxServeError, RuntimeError):
    """The engine itself cannot go on with a request (shut down, out of pages for good)."""


class CompileForbiddenError(EngineError):
    """A program was compiled after warm-up while `forbid_compile` was set."""
