"""Parts of the OpenAPI specification that FastAPI cannot derive: photo bodies and examples."""

from __future__ import annotations

from typing import Any

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
    "images": ["/v1/products/0012/images/0"],
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
