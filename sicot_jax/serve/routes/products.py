"""Routes of products and their pictures."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import quote

import fastapi
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sicot_jax.common.sku import normalize_sku
from sicot_jax.index.backends.base import ProductIndex
from sicot_jax.index.storage.products import ProductRecord
from sicot_jax.search.answer import ScoredProduct
from sicot_jax.serve.errors import NOT_FOUND
from sicot_jax.serve.state import read_index

router = APIRouter(tags=["products"])
_DOT_SEGMENTS = (".", "..")


def product_json(product: ProductRecord) -> dict[str, Any]:
    """Returns a product as the service describes it.

    Args:
      product: product record of the index.

    Returns:
      JSON with the addresses of its pictures, relative to that of the service: they hold behind any
      prefix.
    """
    return {
        "sku": product.sku,
        "title": product.title,
        "tags": product.tags,
        "category": product.category,
        "images": [
            _picture_address(product.sku, number) for number in range(len(product.picture_rows))
        ],
    }


def _picture_address(sku: str, number: int) -> str:
    quoted = quote(sku, safe="")
    # Clients resolve dot segments, also where they are escaped; proxies unescape slashes.
    if sku in _DOT_SEGMENTS or "/" in sku:
        return f"v1/images/{number}?sku={quoted}"
    return f"v1/products/{quoted}/images/{number}"


def scored_product_json(scored: ScoredProduct, score_name: str) -> dict[str, Any]:
    """Returns a product of an answer with its score, its nearest picture first.

    Args:
      scored: product of an answer.
      score_name: "probability" or "similarity".

    Returns:
      JSON of the product.
    """
    content = product_json(scored.product)
    if scored.row in scored.product.picture_rows:
        number = scored.product.picture_rows.index(scored.row)
        content["images"].insert(0, content["images"].pop(number))
    return {**content, score_name: round(scored.score, 6)}


# Before the route of a product, whose SKU may hold slashes.
@router.get(
    "/v1/products/{sku:path}/images/{number}",
    responses=NOT_FOUND,
    description="Returns a photo of a product, as it was indexed.",
)
async def picture(
    request: Request,
    sku: str,
    number: Annotated[str, fastapi.Path(json_schema_extra={"type": "integer"})],
) -> Response:
    """Returns a photo of a product, as it was indexed.

    An SKU may itself end like this address, as `a/images/0` does: the slashes of the address of its
    card are escaped.

    Args:
      request: the request.
      sku: SKU of the product.
      number: position of the photo in the product's `images`.

    Returns:
      The JPEG.

    Raises:
      HTTPException: 404 for an unknown product or number.
    """
    end = f"/images/{number}"
    position = int(number) if re.fullmatch("[0-9]{1,9}", number) else -1
    raw_path: bytes = request.scope.get("raw_path") or end.encode()
    if position < 0 or not raw_path.endswith(end.encode()):
        return await product(request, f"{sku}{end}")
    return await picture_by_sku(request, position, sku)


@router.get(
    "/v1/images/{number}",
    responses=NOT_FOUND,
    description="Returns a photo of a product whose SKU cannot be part of a path.",
)
async def picture_by_sku(
    request: Request,
    number: Annotated[int, fastapi.Path(le=10**9)],
    # What clients make of /v1/products/../images/0.
    sku: Annotated[str, fastapi.Query(max_length=1000)] = "..",
) -> Response:
    """Returns a photo of a product whose SKU cannot be part of a path.

    Args:
      request: the request.
      number: position of the photo in the product's `images`.
      sku: SKU of the product.

    Returns:
      The JPEG.

    Raises:
      HTTPException: 404 for an unknown product or number.
    """

    def read(index: ProductIndex) -> bytes | None:
        product = index.product(normalize_sku(sku))
        if product is None or not 0 <= number < len(product.picture_rows):
            return None
        return index.picture(product.picture_rows[number])

    jpeg = await read_index(request, read)
    if jpeg is None:
        raise HTTPException(404, f"no image {number} of product {sku[:60]!r}")
    return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})


@router.get(
    "/v1/products",
    responses=NOT_FOUND,
    description="Returns a product whose SKU cannot be part of a path.",
)
async def product_by_sku(
    request: Request, sku: Annotated[str, fastapi.Query(max_length=1000)]
) -> Response:
    """Returns a product whose SKU cannot be part of a path.

    Args:
      request: the request.
      sku: SKU of the product.

    Returns:
      JSON of the product.

    Raises:
      HTTPException: 404 for an unknown product.
    """
    return await product(request, sku)


@router.get(
    "/v1/products/{sku:path}",
    responses=NOT_FOUND,
    description="Returns a product with its quality signals and the number of its photos.",
)
async def product(request: Request, sku: str) -> Response:
    """Returns a product with its quality signals and the number of its photos.

    Args:
      request: the request.
      sku: SKU of the product.

    Returns:
      JSON of the product.

    Raises:
      HTTPException: 404 for an unknown product.
    """

    def read(index: ProductIndex) -> dict[str, Any] | None:
        product = index.product(normalize_sku(sku))
        if product is None:
            return None
        return {
            **product_json(product),
            "quality": product.quality,
            "photos": index.count_photos(product.product_id),
        }

    content = await read_index(request, read)
    if content is None:
        raise HTTPException(404, f"no product {sku[:60]!r}")
    return JSONResponse(content)
