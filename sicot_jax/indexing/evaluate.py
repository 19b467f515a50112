"""`sicot evaluate search`: what each module of the visual search adds, as each is switched off in
turn, on test photos.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.config import DataConfig
from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import Neighbours, ProductIndex
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import Found, jax_engine
from sicot_jax.common.markdown import markdown_table
from sicot_jax.search.answer import Answer, Query, Searcher
from sicot_jax.search.category import CategoryFusion, read_fusion
from sicot_jax.search.ranker import Ranker, read_ranker
from sicot_jax.weights import bundle as folders

SHOWN = 20  # similar products
ALL = "all modules"
WHOLE = "whole photos in place of what is in the box"
_BATCH = 32


class _Exact:
    """An index that puts all photos in order by their features."""

    def __init__(self, index: ProductIndex):
        self._index = index

    def nearest(self, embeddings: np.ndarray, k: int, **more: Any) -> list[Neighbours]:
        return self._index.nearest(
            embeddings, k, **more, candidates=self._index.manifest.num_photos
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


@dataclasses.dataclass(frozen=True)
class SearchVariant:
    """A searcher, and whether it ignores the predicted category."""

    searcher: Searcher
    any_category: bool = False


def variants(
    index: ProductIndex, fusion: CategoryFusion | None, ranker: Ranker | None = None
) -> dict[str, SearchVariant]:
    """`ALL`, and each module that the index has switched off."""
    all_modules = Searcher(index, category_fusion=fusion, ranker=ranker)

    def variant(**changes: Any) -> SearchVariant:
        return SearchVariant(dataclasses.replace(all_modules, **changes))

    made = {ALL: SearchVariant(all_modules)}
    if fusion:
        made["similar products of all categories"] = variant(
            category_fusion=dataclasses.replace(fusion, confident_from=None)
        )
        made["products not weighted by category"] = variant(
            category_fusion=dataclasses.replace(fusion, rescaling_exponent=0.0)
        )
        made["no category"] = SearchVariant(all_modules, any_category=True)
    if ranker:
        made["similar products nearest first"] = variant(ranker=None)
    return made | {"exact search in place of codes": variant(index=_Exact(index))}


# A photo's answer, and its product and category -> a number from 0 to 1.
Measure = Callable[[Answer, str, str], float]


def _recognised(k: int) -> Measure:
    return lambda answer, sku, category: float(
        sku in [match.product.sku for match in answer.matches[:k]]
    )


def _found(k: int) -> Measure:
    return lambda answer, sku, category: float(
        sku in [scored.product.sku for scored in answer.similar[:k]]
    )


def _alike(answer: Answer, sku: str, category: str) -> float:
    return sum(scored.product.category == category for scored in answer.similar) / max(
        len(answer.similar), 1
    )


MEASURES: dict[str, Measure] = {
    "recognised, top-1": _recognised(1),
    "recognised, top-5": _recognised(5),
    "same product first": _found(1),
    "same product in 5": _found(5),
    "same product in 20": _found(SHOWN),
    "of the same category": _alike,
}


def evaluate(indexes: Sequence[Path], path: str) -> str:
    """Tables in Markdown. indexes: of runs of several seeds on the catalogue in `path`. Per cent of
    its test photos, 95 % intervals over photos and seeds; rows below the first are differences from
    it. InputError: an index of other data.
    """
    catalog = open_catalog(DataConfig(source="imported", path=path))
    seeds = [_of_index(index, catalog) for index in indexes]
    if any(list(one) != list(seeds[0]) for one in seeds):
        raise InputError(
            f"{indexes[0]}: some of these indexes have categories (of enough validation photos), a ranker or a box, others not"
        )
    whole = np.stack([one[ALL] for one in seeds])
    rows = [[ALL, *(f"{100 * whole[..., m].mean():.2f}" for m in range(len(MEASURES)))]]
    for name in list(seeds[0])[1:]:
        less = np.stack([one[name] for one in seeds]) - whole
        rows.append([name, *(_cell(less[..., m]) for m in range(len(MEASURES)))])
    header = [
        f"{catalog.name}, {whole.shape[1]} test photos, {len(indexes)} seeds",
        *(f"{name}, %" for name in MEASURES),
    ]
    return markdown_table(header, rows)


def _cell(difference: np.ndarray) -> str:
    low, high = (100 * x for x in paired_interval(difference))
    return f"{100 * difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]" if difference.any() else "0"


def _of_index(index: Path, catalog: Catalog) -> dict[str, np.ndarray]:
    """Variant -> [photos, measures]."""
    version = layout.current_version(index)
    opened = open_index(version)
    if opened.manifest.data_hash != catalog.data_hash:
        raise InputError(
            f"{index}: of another catalogue than {catalog.name}; give the one it was built from"
        )
    split, found = catalog.splits["test"], list[list[list[float]]]()
    with contextlib.closing(opened):
        asked = variants(
            opened,
            read_fusion(version / layout.CATEGORY_FUSION),
            read_ranker(version / layout.RANKER),
        )
        converted = folders.read_converted(version / layout.MODEL)
        if converted.model.box != "none":
            asked[WHOLE] = asked[ALL]
        for seen, whole, sku, category in tqdm(
            _photos(converted, split), total=len(split), desc=index.name, disable=None
        ):
            answers = (
                a.searcher.answer(
                    Query(
                        photo.embedding,
                        photo.logits,
                        k=5,
                        num_similar=SHOWN,
                        any_category=a.any_category,
                    )
                )
                for name, a in asked.items()
                for photo in (whole if name == WHOLE else seen,)
            )
            found.append(
                [
                    [measure(answer, sku, category) for measure in MEASURES.values()]
                    for answer in answers
                ]
            )
    return dict(zip(asked, np.swapaxes(np.array(found), 0, 1), strict=True))


def _photos(converted: folders.Converted, split: Any) -> Iterator[tuple[Found, Found, str, str]]:
    """What the network finds in each test photo, and what it would without its box branch, SKU and
    category.
    """
    engine = jax_engine(converted)
    without = dataclasses.replace(converted, model=dataclasses.replace(converted.model, box="none"))
    whole = engine if without == converted else jax_engine(without)
    for first in range(0, len(split), _BATCH):
        records = [split[i] for i in range(first, min(first + _BATCH, len(split)))]
        photos = converted.preprocessing.batch([record["image"] for record in records])
        seen = engine(photos)
        as_whole = seen if whole is engine else whole(photos)
        for record, one, other in zip(records, seen.each(), as_whole.each(), strict=True):
            yield one, other, record["sku"], record["category"]
