"""Error responses of the service: one JSON format for all."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import IndexUnavailableError
from sicot_jax.serve.photo import PhotoError

_log = logging.getLogger("sicot")


def error_response(
    request: Request,
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Returns an error in the service's format.

    Args:
      request: the request.
      status: HTTP status.
      code: code of the error, for programs.
      message: one line for people.
      headers: further headers.

    Returns:
      JSON {"error": {"code", "message", "request_id"}}; with status 503 a Retry-After header.
    """
    content = {"error": {"code": code, "message": message, "request_id": request.state.request_id}}
    retry = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse(content, status, headers={**(headers or {}), **retry})


def add_error_handlers(app: FastAPI) -> None:
    """Makes all exceptions of handlers responses in the service's format.

    Args:
      app: the app.
    """

    @app.exception_handler(PhotoError)
    async def handle_photo(request: Request, error: PhotoError) -> Response:
        return error_response(request, error.status, error.code, str(error))

    @app.exception_handler(InputError)
    async def handle_input(request: Request, error: InputError) -> Response:
        return error_response(request, 422, "bad_input", str(error))

    @app.exception_handler(IndexUnavailableError)
    async def handle_unavailable(request: Request, error: IndexUnavailableError) -> Response:
        _log.error("%s %s", request.state.request_id, error)
        message = "the index cannot be read at the moment; try again"
        return error_response(request, 503, "error", message)

    @app.exception_handler(RequestValidationError)
    async def handle_validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        parameter = ".".join(str(part) for part in first["loc"][1:])
        return error_response(request, 422, "bad_parameter", f"{parameter}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        return error_response(request, error.status_code, code, str(error.detail), error.headers)
