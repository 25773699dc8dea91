"""What goes wrong, as HTTP: one exception, two JSON shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from msgspec import Struct
from starlette.exceptions import HTTPException

from jaxserve.errors import EngineError, RequestError

log = logging.getLogger(__name__)


class ErrorDetail(Struct, kw_only=True):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct, kw_only=True):
    """OpenAI's error shape."""

    error: ErrorDetail


class AnthropicErrorDetail(Struct, kw_only=True):
    """Anthropic's description of an error."""

    type: str
    message: str


class AnthropicErrorBody(Struct, kw_only=True, tag="error"):
    """Anthropic's error shape."""

    error: AnthropicErrorDetail


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        message: what was seen, what was expected and the remedy.
        param: the request field at fault.
        code: OpenAI's machine-readable name of the error.
        headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self, path: str) -> ErrorBody | AnthropicErrorBody:
        """The JSON for a client of `path`: Anthropic's clients expect Anthropic's shape."""
        if path.startswith("/v1/messages"):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            kind = "api_error" if self.status >= 500 and self.status != 503 else kind
            return AnthropicErrorBody(error=AnthropicErrorDetail(type=kind, message=self.message))
        kind = "server_error" if self.status >= 500 else _OPENAI_TYPES.get(self.status)
        return ErrorBody(
            error=ErrorDetail(
                message=self.message,
                type=kind or "invalid_request_error",
                param=self.param,
                code=self.code,
            )
        )


_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def as_api_error(error: BaseException) -> ApiError:
    """The answer to any exception. What jaxserve did not raise on purpose is logged, not shown."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case EngineError():
            return ApiError(503, str(error), code="engine_error", headers={"Retry-After": "1"})
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case _:
            log.error("unexpected error while serving a request", exc_info=error)
            return ApiError(500, "internal error; the server's log has the details")
