"""The HTTP service: what it takes, what it answers, and nothing else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from sicot_jax._version import __version__
from sicot_jax.errors import InputError
from sicot_jax.events import store as events_of
from sicot_jax.events.store import Events
from sicot_jax.index.backends.base import IndexUnavailable, ProductIndex
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.search import answer as recognition
from sicot_jax.search.answer import Scored
from sicot_jax.serve import box as boxes
from sicot_jax.serve import metrics, photo
from sicot_jax.serve import model_manager as live
from sicot_jax.serve.api_keys import read_keys
from sicot_jax.serve.box import Box
from sicot_jax.serve.middleware import Gate
from sicot_jax.serve.photo import PhotoError, PixelBudget
from sicot_jax.serve.query_store import Queries
from sicot_jax.serve.settings import Settings

_T = TypeVar("_T")
PAGE = Path(__file__).parent / "page"
_log = logging.getLogger("sicot")
_BODY = {
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
_ERROR = {
    "error": {
        "code": "not_a_photo",
        "message": "not a photo; wanted one of JPEG, PNG, ...",
        "request_id": "9f...",
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"example": _ERROR}}}
    for status, text in {
        400: "a broken photo or request",
        401: "no API key, or an unknown one",
        408: "the request came too slowly",
        413: "too many bytes or pixels",
        415: "not a photo, or a format that is not taken",
        422: "a parameter outside its range",
        503: "busy, or not ready: try again after Retry-After seconds",
    }.items()
}
_EXAMPLE = {
    "request_id": "9f86d081884c7d65", "known": True, "certainty": 0.97,
    "products": [{"sku": "0012", "title": "red cotton shirt", "tags": "", "category": "Shirts", "probability": 0.93,
                  "images": ["/v1/products/0012/images/0"]}],
    "categories": [{"name": "Shirts", "probability": 0.98}, {"name": "Tops", "probability": 0.02}], "searched": "Shirts",
    "ranker": "5891b5b522d5",
    "similar": [{"sku": "0012", "title": "red cotton shirt", "tags": "", "category": "Shirts", "similarity": 0.88,
                 "images": ["/v1/products/0012/images/0"]}],
    "box": [0.21, 0.08, 0.74, 0.93], "box_given": False,
    "timings_ms": {"read": 0.2, "decode": 3.1, "engine": 21.4, "search": 2.2},
    "model": "b1946ac92492", "index": "v000003",
}  # fmt: skip


_BOX = Query(
    None,
    max_length=200,
    description="left,top,right,bottom of the part of the photo to look at, fractions of the photo as a person sees it",
    examples=["0.21,0.08,0.74,0.93"],
)


@dataclasses.dataclass
class _State:
    """What the handlers share, once the service is ready."""

    settings: Settings
    current: live.Current
    decoders: concurrent.futures.ThreadPoolExecutor
    events: Events | None
    queries: Queries | None
    budget: PixelBudget
    photos: int = 0  # of requests that are not answered yet

    @contextlib.contextmanager
    def taken_in(self) -> Iterator[None]:
        self.photos += 1
        try:
            with metrics.IN_FLIGHT.track_inprogress():
                yield
        finally:
            self.photos -= 1


def create_app(settings: Settings) -> FastAPI:
    """The service over an index; it loads and compiles when it starts, and is ready when `/readyz`
    says so.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        current = live.Current(await loop.run_in_executor(None, live.load, settings))
        loaded = current.live
        _log.info(
            "ready: index %s, engine %s, batches up to %d (%s)", loaded.version, loaded.chosen.kind, loaded.chosen.largest,
            ", ".join(f"{size}: {ms:.1f} ms" for size, ms in loaded.chosen.milliseconds.items()),
        )  # fmt: skip
        app.state.sicot = state = _State(
            settings,
            current,
            concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "decode"),
            Events(Path(settings.events)) if settings.events else None,
            Queries(Path(settings.keep_queries), settings.keep_days)
            if settings.keep_queries
            else None,
            PixelBudget(settings.limits.pixels),
        )
        watching = asyncio.gather(live.keep_current(current, settings), _clean(state.queries))
        try:
            yield
        finally:
            app.state.sicot = None
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            state.decoders.shutdown()
            if state.events is not None:
                state.events.close()

    app = FastAPI(
        title="sicot_jax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Recognises the product in a photo, and finds similar ones.",
    )  # fmt: skip
    app.state.sicot = None
    app.add_middleware(
        Gate,
        keys=read_keys(Path(settings.keys)) if settings.keys else None,
        largest_body=_largest_body(settings),
    )
    _add_errors(app)
    _add_routes(app)
    return app


async def _clean(queries: Queries | None) -> None:
    """For ever: kept photos go when their days are over, also while nobody asks."""
    while queries is not None:
        await asyncio.sleep(60)
        await asyncio.get_running_loop().run_in_executor(None, queries.clean)


def _largest_body(settings: Settings) -> int:
    return settings.limits.bytes * 4 // 3 + 10_000  # base64, and what multipart puts around it


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(PhotoError)
    async def bad_photo(request: Request, error: PhotoError) -> Response:
        return _error(request, error.status, error.code, str(error))

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> Response:
        return _error(request, 422, "bad_input", str(error))

    @app.exception_handler(IndexUnavailable)
    async def unavailable(request: Request, error: IndexUnavailable) -> Response:
        _log.error("%s %s", request.state.request_id, error)
        return _error(request, 503, "error", "the index cannot be read at the moment; try again")

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(request, 422, "bad_parameter", f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        return _error(request, error.status_code, code, str(error.detail), error.headers)


def _error(request: Request, status: int, code: str, message: str, headers: Any = None) -> Response:
    content = {"error": {"code": code, "message": message, "request_id": request.state.request_id}}
    retry = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse(content, status, headers={**(headers or {}), **retry})


def _add_routes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operation"])
    async def readyz(request: Request) -> dict[str, Any]:
        """Model and index are loaded, every batch size compiled. milliseconds: of a call of each
        size, where two calls share
        the machine, divided by two: what a batch costs under load, not how long one waits for it.
        """
        loaded = _state(request).current.live
        chosen = loaded.chosen
        return {
            "status": "ready",
            "index": loaded.version,
            "model": loaded.index.manifest.model_sha256[:12],
            "engine": chosen.kind,
            "largest_batch": chosen.largest,
            "milliseconds": chosen.milliseconds,
            **loaded.index.counts(),
        }

    @app.get("/metrics", tags=["operation"])
    async def metrics_text() -> Response:
        """For Prometheus."""
        text, kind = metrics.exposition()
        return Response(text, headers={"Content-Type": kind})

    answer: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {"example": _EXAMPLE}}}
    }

    @app.post(
        "/v1/recognize", tags=["photos"], openapi_extra=_BODY, responses={**_ERRORS, **answer}
    )
    async def recognize(
        request: Request,
        k: int = Query(5, ge=1, le=100, description="products"),
        similar: int = Query(20, ge=0, le=200, description="similar products"),
        category: str | None = Query(None, max_length=1000, description="of the similar products"),
        any_category: bool = Query(False, description="the photo's category decides nothing"),
        box: str | None = _BOX,
        rerank: bool = Query(
            True, description="similar products as the index's ranker has them, else nearest first"
        ),
    ) -> Response:
        """The product that a photo shows, how sure that is, and similar ones. categories: the most
        probable; where the first is sure and nothing else is asked for, similar products are of it
        (`searched`). box: where in the photo the product is, as asked for (`box_given`) or as the
        model says, null where it says nothing.
        """
        return await _with_photo(
            request, _Wanted(k, similar, category, any_category, rerank), _box(box)
        )

    @app.post("/v1/search", tags=["photos"], openapi_extra=_BODY, responses=_ERRORS)
    async def search(
        request: Request,
        similar: int = Query(20, ge=1, le=200),
        category: str | None = Query(None, max_length=1000),
        any_category: bool = Query(
            False, description="of all categories, also where the photo's is sure"
        ),
        box: str | None = _BOX,
        rerank: bool = Query(
            True, description="as the index's ranker has them, else nearest first"
        ),
    ) -> Response:
        """Products that look like the photo."""
        return await _with_photo(
            request, _Wanted(0, similar, category, any_category, rerank), _box(box)
        )

    @app.get(
        "/v1/products/{sku:path}/images/{number}", tags=["products"], responses={404: _ERRORS[400]}
    )
    async def picture(request: Request, sku: str, number: int) -> Response:
        """A photo of a product, as it was indexed."""

        def read(index: ProductIndex) -> bytes | None:
            product = index.product(sku)
            there = product is not None and 0 <= number < len(product.picture_rows)
            return (
                index.picture(product.picture_rows[number]) if product is not None and there else None
            )

        jpeg = await _read(request, read)
        if jpeg is None:
            raise HTTPException(404, f"no image {number} of product {sku[:60]!r}")
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    @app.get("/v1/products/{sku:path}", tags=["products"], responses={404: _ERRORS[400]})
    async def product(request: Request, sku: str) -> dict[str, Any]:
        """A product's card."""

        def read(index: ProductIndex) -> dict[str, Any] | None:
            product = index.product(sku)
            if product is None:
                return None
            return {
                **_card(product),
                "quality": product.quality,
                "photos": index.count_photos(product.product_id),
            }

        found = await _read(request, read)
        if found is None:
            raise HTTPException(404, f"no product {sku[:60]!r}")
        return found

    @app.post(
        "/v1/events", tags=["events"], status_code=202, responses={**_ERRORS, 404: _ERRORS[400]}
    )
    async def events(request: Request) -> dict[str, int]:
        """Events of visitors: a list of at most 1,000; those that are there already stay as they
        are.
        """
        store = _state(request).events
        if store is None:
            raise HTTPException(404, "this service keeps no events; start it with --events FILE")
        seconds = _state(request).settings.seconds
        try:
            async with asyncio.timeout(seconds):
                listed = json.loads(await request.body())
        except TimeoutError:
            raise PhotoError(
                408, "too_slow", f"no whole request within {seconds:g} seconds"
            ) from None
        except (ValueError, RecursionError) as error:
            raise PhotoError(
                400, "bad_json", f"the request is no JSON ({type(error).__name__})"
            ) from error
        if (
            not isinstance(listed, list)
            or len(listed) > 1000
            or not all(isinstance(e, dict) for e in listed)
        ):
            raise InputError("wanted a list of at most 1000 events")
        parsed = []
        for number, values in enumerate(listed):
            try:
                parsed.append(events_of.parse(values))
            except InputError as error:
                raise InputError(f"event {number}: {error}; none was stored") from error
        new = await asyncio.get_running_loop().run_in_executor(None, store.add, parsed)
        return {"received": len(parsed), "new": new}

    for path in sorted(PAGE.iterdir()):
        address = "/" if path.name == "index.html" else f"/{path.name}"
        app.add_api_route(address, _page(path), include_in_schema=False)


def _page(path: Path) -> Callable[[], Awaitable[Response]]:
    kind = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}[path.suffix]
    content = path.read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


def _state(request: Request) -> _State:
    state = request.app.state.sicot
    if state is None:
        raise HTTPException(503, "not ready yet")
    return state


async def _read(request: Request, read: Callable[[ProductIndex], _T]) -> _T:
    """Of the index, in a thread."""
    state = _state(request)
    return await asyncio.get_running_loop().run_in_executor(
        state.decoders, read, state.current.live.index
    )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Of `recognition.answer`."""

    k: int
    similar: int
    category: str | None
    any_category: bool
    rerank: bool


def _box(given: str | None) -> Box | None:
    return None if given is None else boxes.parse(given)


async def _with_photo(request: Request, wanted: _Wanted, box: Box | None) -> Response:
    state, seconds, clock = _state(request), _state(request).settings.seconds, _Clock()
    try:
        async with asyncio.timeout(seconds):
            data = await _photo_bytes(request, state.settings)
    except TimeoutError:
        return _error(request, 408, "too_slow", f"no whole photo within {seconds:g} seconds")
    clock.stop("read")
    loaded = state.current.live
    with state.taken_in():  # after its photo is here: a slow sender takes no one's place
        if state.photos > max(
            2 * loaded.chosen.largest, state.settings.wait_seconds * 1e3 / _per_photo(loaded)
        ):
            raise HTTPException(503, "busy; try again")
        try:
            async with asyncio.timeout(seconds):
                content = await _answer(state, loaded, data, clock, wanted, box)
        except TimeoutError:
            raise HTTPException(
                503, f"not answered within {seconds:g} seconds; try again"
            ) from None
    if state.queries is not None:
        await asyncio.get_running_loop().run_in_executor(
            None, state.queries.keep, request.state.request_id, data
        )
    return JSONResponse({"request_id": request.state.request_id, **content})


def _per_photo(loaded: live.Live) -> float:
    """Milliseconds of a photo in the batches that are used."""
    return loaded.chosen.milliseconds[loaded.chosen.largest] / loaded.chosen.largest


async def _answer(
    state: _State, loaded: live.Live, data: bytes, clock: _Clock, wanted: _Wanted, box: Box | None
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    decoded = await loop.run_in_executor(
        state.decoders,
        photo.decode,
        data,
        loaded.chosen.preprocessing,
        state.settings.limits,
        state.budget,
        box,
    )
    clock.stop("decode")
    seen = await loaded.batcher(decoded.pixels)
    clock.stop("engine")

    def look_up() -> recognition.Answer:
        return recognition.answer(
            loaded.index,
            loaded.calibration,
            loaded.fusion,
            seen.embedding,
            seen.logits,
            ranker=loaded.ranker,
            **dataclasses.asdict(wanted),
        )

    found = await loop.run_in_executor(state.decoders, look_up)
    clock.stop("search")
    content: dict[str, Any] = {}
    if wanted.k:
        sure = None if found.certainty is None else round(found.certainty, 4)
        content = {"known": found.known, "certainty": sure}
        content["products"] = [_scored(s, "probability") for s in found.matches]
        if found.known is False:
            metrics.UNKNOWN.inc()
    told = box or (None if seen.box is None else decoded.seen.within(seen.box.tolist()).inside())
    likely = found.category.likely if found.category else []
    return {
        **content,
        "categories": [{"name": name, "probability": round(share, 4)} for name, share in likely],
        "searched": found.searched,
        "similar": [_scored(s, "similarity") for s in found.similar],
        "box": told and [round(side, 4) for side in told],
        "box_given": box is not None,
        "ranker": loaded.ranker.version[:12] if loaded.ranker and wanted.rerank else None,
        "timings_ms": clock.milliseconds,
        "model": loaded.index.manifest.model_sha256[:12],
        "index": loaded.version,
    }


class _Clock:
    def __init__(self) -> None:
        self._start, self.milliseconds = time.perf_counter(), dict[str, float]()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.milliseconds[stage] = round((now - self._start) * 1e3, 2)
        metrics.STAGES.labels(stage).observe(now - self._start)
        self._start = now


async def _photo_bytes(request: Request, settings: Settings) -> bytes:
    """The photo of a request: a form's field "photo", JSON with base64, or the body itself."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _from_form(request, settings)
    body = await request.body()
    if kind == "application/json":
        try:
            stored = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise PhotoError(
                400, "bad_json", f"the request is no JSON ({type(error).__name__})"
            ) from error
        if not isinstance(stored, dict) or not isinstance(stored.get("photo"), str):
            raise PhotoError(400, "no_photo", 'wanted {"photo": "BASE64"}')
        return photo.from_base64(stored["photo"], settings.limits)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return body
    raise PhotoError(415, "content_type", "wanted multipart/form-data, application/json or image/*")


async def _from_form(request: Request, settings: Settings) -> bytes:
    try:
        form = await MultiPartParser(
            request.headers,
            request.stream(),
            max_files=1,
            max_fields=10,
            max_part_size=settings.limits.bytes,
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


def _card(product: ProductRecord) -> dict[str, Any]:
    place = f"/v1/products/{quote(product.sku, safe='')}/images/"
    return {
        "sku": product.sku,
        "title": product.title,
        "tags": product.tags,
        "category": product.category,
        "images": [f"{place}{number}" for number in range(len(product.picture_rows))],
    }


def _scored(scored: Scored, name: str) -> dict[str, Any]:
    card = _card(scored.product)
    if scored.row in scored.product.picture_rows:  # the nearest photo first
        number = scored.product.picture_rows.index(scored.row)
        card["images"].insert(0, card["images"].pop(number))
    return {**card, name: round(scored.score, 6)}
