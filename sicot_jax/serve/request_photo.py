"""Extracts the query photo from a request: a form, JSON with base64, or the body itself."""

from __future__ import annotations

import json

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser

from sicot_jax.serve.photo import PhotoError, PhotoLimits, decode_base64


async def read_photo(request: Request, limits: PhotoLimits) -> bytes:
    """Returns the photo of a request.

    Args:
      request: multipart/form-data with a field "photo", application/json {"photo": BASE64}, or
        image/* with the photo as its body.
      limits: limits of a photo.

    Returns:
      The photo file's bytes.

    Raises:
      PhotoError: no photo in the request, or another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    body = await request.body()
    if kind == "application/json":
        content = parse_json(body)
        if not isinstance(content, dict) or not isinstance(content.get("photo"), str):
            raise PhotoError(400, "no_photo", 'wanted {"photo": "BASE64"}')
        return decode_base64(content["photo"], limits)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return body
    raise PhotoError(415, "content_type", "wanted multipart/form-data, application/json or image/*")


def parse_json(body: bytes) -> object:
    """Parses the body of a request.

    Args:
      body: bytes of the request.

    Returns:
      The JSON value.

    Raises:
      PhotoError: not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PhotoError(
            400, "bad_json", f"the request is no JSON ({type(error).__name__})"
        ) from error


async def _read_form(request: Request, limits: PhotoLimits) -> bytes:
    try:
        form = await MultiPartParser(
            request.headers,
            request.stream(),
            max_files=1,
            max_fields=10,
            max_part_size=limits.bytes,
        ).parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        raise PhotoError(
            400, "bad_form", f"the form cannot be read ({str(error)[:100]})"
        ) from error
    try:
        field = form.get("photo")
        if field is None or isinstance(field, str):
            raise PhotoError(400, "no_photo", 'wanted a file in the form\'s field "photo"')
        return await field.read()
    finally:
        await form.close()
