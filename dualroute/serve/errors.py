"""Errors in the form that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is answered by an error.

    Args:
        status: Of HTTP.
        message: What is wrong, and what to do.
        param: The field it is about.
        code: A word for programs.
        headers: Further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As the answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'malformed')}"[:300])
    words = first["msg"].removeprefix("Value error, ")
    name = ".".join(place)
    message = f"{name}: {words}" if name else words
    if first.get("type") != "missing" and not isinstance(first.get("input"), dict | list):
        message += f" (it is {str(first.get('input'))[:80]!r})"
    return ApiError(400, message[:1000], name or None)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` in this form."""

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not for this path",
        }
        message = words.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server has failed ({type(error).__name__}); its log says more").response()
