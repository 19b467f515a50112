"""Routes that answer a query photo: recognition and similarity search."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sicot_jax.common.sku import normalize_category
from sicot_jax.recognizer import EngineOutputs
from sicot_jax.search.answer import Answer, Query
from sicot_jax.serve import metrics
from sicot_jax.serve.admission import PhotoClock
from sicot_jax.serve.box import Box, parse_box
from sicot_jax.serve.errors import ANSWER_RESPONSE, PHOTO_BODY, PHOTO_ERRORS, error_response
from sicot_jax.serve.model_manager import ServingModel
from sicot_jax.serve.photo import DecodedPhoto, decode_query_photo, read_photo
from sicot_jax.serve.routes.products import scored_product_json
from sicot_jax.serve.state import ServiceState, service_state

router = APIRouter(tags=["photos"])
_RECOGNIZE_DESCRIPTION = """\
Recognises the product in a photo and finds similar products.

`confidence` is the calibrated probability that the first product is right; `known` is false where
the photo is rejected as showing no product of the catalogue. `categories` are the most probable
ones; where the first is confident and no other is asked for, similar products are limited to it
(`searched`). `box` is where the product is in the photo, as requested (`box_given`) or as predicted
by the model; null where the model predicts none.
"""

_Category = Annotated[
    str | None,
    fastapi.Query(max_length=1000, description="category that similar products are limited to"),
]
_AnyCategory = Annotated[bool, fastapi.Query(description="ignore the photo's predicted category")]
_BoxText = Annotated[
    str | None,
    fastapi.Query(
        max_length=200,
        description="left,top,right,bottom of the part of the photo to use, as fractions of the "
        "upright photo",
        examples=["0.21,0.08,0.74,0.93"],
    ),
]
_Rerank = Annotated[
    bool,
    fastapi.Query(
        description="similar products in the order of the index's ranker, otherwise nearest first"
    ),
]


@dataclasses.dataclass(frozen=True)
class PhotoRequest:
    """What a request asks about its photo.

    Attributes:
      k: number of recognised products; 0 for a similarity search alone.
      num_similar: number of similar products.
      category: category that similar products are limited to.
      any_category: ignore the predicted category.
      rerank: let the ranker order the similar products.
      box: the part of the photo to use; None for the full photo.
    """

    k: int
    num_similar: int
    category: str | None
    any_category: bool
    rerank: bool
    box: Box | None

    def query(self, result: EngineOutputs) -> Query:
        """Returns the query of the photo.

        Args:
          result: the engine's result on the photo.

        Returns:
          The query.
        """
        return Query(
            result.embedding,
            result.logits,
            k=self.k,
            num_similar=self.num_similar,
            category=self.category,
            any_category=self.any_category,
            rerank=self.rerank,
        )


@router.post(
    "/v1/recognize",
    openapi_extra=PHOTO_BODY,
    responses={**PHOTO_ERRORS, **ANSWER_RESPONSE},
    description=_RECOGNIZE_DESCRIPTION,
)
async def recognize(
    request: Request,
    k: Annotated[int, fastapi.Query(ge=1, le=100, description="number of products")] = 5,
    similar: Annotated[
        int, fastapi.Query(ge=0, le=200, description="number of similar products")
    ] = 20,
    category: _Category = None,
    any_category: _AnyCategory = False,
    box: _BoxText = None,
    rerank: _Rerank = True,
) -> Response:
    """Recognises the product in a photo and finds similar products.

    Args:
      request: the request with the photo.
      k: number of products.
      similar: number of similar products.
      category: category that similar products are limited to.
      any_category: ignore the photo's predicted category.
      box: left,top,right,bottom of the part of the photo to use.
      rerank: let the ranker order the similar products.

    Returns:
      JSON of the answer.

    Raises:
      HTTPException: 503 where the service is not ready, busy or too slow.
      PhotoError: the request has no usable photo.
      InputError: a malformed box, or an unknown category.
    """
    wanted = PhotoRequest(
        k, similar, _asked_category(category), any_category, rerank, _requested_box(box)
    )
    return await _answer_request(request, wanted)


@router.post(
    "/v1/search",
    openapi_extra=PHOTO_BODY,
    responses=PHOTO_ERRORS,
    description="Finds products that look similar to the photo.",
)
async def search(
    request: Request,
    similar: Annotated[
        int, fastapi.Query(ge=1, le=200, description="number of similar products")
    ] = 20,
    category: _Category = None,
    any_category: _AnyCategory = False,
    box: _BoxText = None,
    rerank: _Rerank = True,
) -> Response:
    """Finds products that look similar to the photo.

    Args:
      request: the request with the photo.
      similar: number of similar products.
      category: category that similar products are limited to.
      any_category: ignore the photo's predicted category.
      box: left,top,right,bottom of the part of the photo to use.
      rerank: let the ranker order the similar products.

    Returns:
      JSON of the answer.

    Raises:
      HTTPException: 503 where the service is not ready, busy or too slow.
      PhotoError: the request has no usable photo.
      InputError: a malformed box, or an unknown category.
    """
    wanted = PhotoRequest(
        0, similar, _asked_category(category), any_category, rerank, _requested_box(box)
    )
    return await _answer_request(request, wanted)


def _requested_box(text: str | None) -> Box | None:
    return None if text is None else parse_box(text)


def _asked_category(text: str | None) -> str | None:
    return None if text is None else normalize_category(text) or None


async def _answer_request(request: Request, wanted: PhotoRequest) -> Response:
    state, timer = service_state(request), _StageTimer()
    model, seconds = state.models.current, state.settings.timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            data = await read_photo(request, state.settings.limits)
    except TimeoutError:
        return error_response(
            request, 408, "too_slow", f"no complete photo within {seconds:g} seconds"
        )
    timer.stop("read")
    # Counted only once the photo is here: a slow sender blocks nobody.
    with state.admission.photo(state.photo_seconds) as clock:
        try:
            async with asyncio.timeout(seconds):
                content = await _answer_photo(state, model, data, wanted, clock, timer)
        except TimeoutError:
            raise HTTPException(
                503, f"not answered within {seconds:g} seconds; try again"
            ) from None
    request_id = request.state.request_id
    if state.queries is not None:
        await asyncio.get_running_loop().run_in_executor(None, state.queries.save, request_id, data)
    return JSONResponse({"request_id": request_id, **content})


async def _answer_photo(
    state: ServiceState,
    model: ServingModel,
    data: bytes,
    wanted: PhotoRequest,
    clock: PhotoClock,
    timer: _StageTimer,
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()

    def decode() -> DecodedPhoto:
        if wanted.category is not None:
            model.searcher.check_category(wanted.category)
        return decode_query_photo(
            data,
            model.engine.preprocessing,
            state.settings.limits,
            state.budget,
            wanted.box,
            clock,
        )

    def search(query: Query) -> Answer:
        with clock.work():
            return model.searcher.answer(query)

    photo = await loop.run_in_executor(state.threads, decode)
    timer.stop("decode")
    result = await model.batcher(photo.pixels, clock)
    timer.stop("engine")
    answer = await loop.run_in_executor(state.threads, search, wanted.query(result))
    timer.stop("search")
    if wanted.k and answer.known is False:
        metrics.REJECTED.inc()
    box = wanted.box or _predicted_box(photo, result)
    ranker = model.searcher.ranker if wanted.rerank else None
    return {
        **_answer_json(answer, with_products=wanted.k > 0),
        "box": box and [round(side, 4) for side in box],
        "box_given": wanted.box is not None,
        "ranker": ranker.version[:12] if ranker else None,
        "timings_ms": timer.milliseconds,
        "model": model.model_id,
        "index": model.version,
    }


def _predicted_box(photo: DecodedPhoto, result: EngineOutputs) -> Box | None:
    if result.box is None:
        return None
    return photo.visible.to_photo(result.box.tolist()).clipped()


def _answer_json(answer: Answer, *, with_products: bool) -> dict[str, Any]:
    recognised: dict[str, Any] = {}
    if with_products:
        confidence = answer.confidence
        recognised = {
            "known": answer.known,
            "confidence": None if confidence is None else round(confidence, 4),
            "products": [scored_product_json(match, "probability") for match in answer.matches],
        }
    categories = answer.category.top if answer.category else []
    return {
        **recognised,
        "categories": [
            {"name": name, "probability": round(probability, 4)} for name, probability in categories
        ],
        "searched": answer.searched_category,
        "similar": [scored_product_json(scored, "similarity") for scored in answer.similar],
    }


class _StageTimer:
    """Measures the stages of a request."""

    def __init__(self) -> None:
        self._start, self.milliseconds = time.perf_counter(), dict[str, float]()

    def stop(self, stage: str) -> None:
        """Ends a stage; the next one begins."""
        now = time.perf_counter()
        self.milliseconds[stage] = round((now - self._start) * 1e3, 2)
        metrics.STAGE_SECONDS.labels(stage).observe(now - self._start)
        self._start = now
