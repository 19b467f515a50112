"""Routes of the web page.

starlette's StaticFiles is not used: mounted at "/" it would answer 404 where a route exists for
another method only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Response

_PAGE = Path(__file__).parents[1] / "page"
_CONTENT_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def create_page_router() -> APIRouter:
    """Returns a router of the page's files, read once."""
    router = APIRouter()
    for path in sorted(_PAGE.iterdir()):
        address = "/" if path.name == "index.html" else f"/{path.name}"
        router.add_api_route(address, _file_handler(path), include_in_schema=False)
    return router


def _file_handler(path: Path) -> Callable[[], Awaitable[Response]]:
    content, content_type = path.read_bytes(), _CONTENT_TYPES[path.suffix]

    async def send_file() -> Response:
        return Response(content, media_type=content_type, headers={"Cache-Control": "no-cache"})

    return send_file
