"""Errors of the HTTP interface and what OpenAPI says of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

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
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"  # by RequestMiddleware
        return error_response(request, error.status_code, code, str(error.detail), headers)


PHOTO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"photo": {"type": "string", "format": "binary"}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["photo"],
                    "properties": {"photo": {"type": "string"}},
                },
                "example": {"photo": "/9j/4AAQSkZJRg... (base64 of a JPEG, PNG, WebP, GIF or BMP)"},
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ERROR_EXAMPLE = {
    "error": {
        "code": "not_a_photo",
        "message": "not a photo; wanted one of JPEG, PNG, ...",
        "request_id": "9f...",
    }
}
Responses = dict[int | str, dict[str, Any]]
ERROR_RESPONSES: Responses = {
    status: {"description": text, "content": {"application/json": {"example": _ERROR_EXAMPLE}}}
    for status, text in {
        400: "broken photo or malformed request",
        401: "API key missing or unknown",
        404: "not found",
        408: "the request took too long to arrive",
        413: "too many bytes or pixels",
        415: "not a photo, or a format that is not supported",
        422: "a parameter outside its range",
        503: "busy, or not ready: try again after Retry-After seconds",
    }.items()
}
PHOTO_ERRORS: Responses = {k: v for k, v in ERROR_RESPONSES.items() if k != 404}
NOT_FOUND: Responses = {404: ERROR_RESPONSES[404]}

_PRODUCT_EXAMPLE = {
    "sku": "0012",
    "title": "red cotton shirt",
    "tags": "",
    "category": "Shirts",
    "images": ["v1/products/0012/images/0"],
}
_ANSWER_EXAMPLE = {
    "request_id": "9f86d081884c7d65",
    "known": True,
    "confidence": 0.97,
    "products": [{**_PRODUCT_EXAMPLE, "probability": 0.93}],
    "categories": [
        {"name": "Shirts", "probability": 0.98},
        {"name": "Tops", "probability": 0.02},
    ],
    "searched": "Shirts",
    "ranker": "5891b5b522d5",
    "similar": [{**_PRODUCT_EXAMPLE, "similarity": 0.88}],
    "box": [0.21, 0.08, 0.74, 0.93],
    "box_given": False,
    "timings_ms": {"read": 0.2, "decode": 3.1, "engine": 21.4, "search": 2.2},
    "model": "b1946ac92492",
    "index": "v000003",
}
ANSWER_RESPONSE: Responses = {200: {"content": {"application/json": {"example": _ANSWER_EXAMPLE}}}}
