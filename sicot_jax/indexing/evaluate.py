"""`sicot evaluate search`: an ablation of the visual search on test photos."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sicot_jax.catalog.catalog import Catalog, Split
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.common.text import markdown_table
from sicot_jax.config import DataConfig
from sicot_jax.errors import InputError
from sicot_jax.index.backends.base import Neighbours, ProductIndex
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import EngineOutputs, jax_engine
from sicot_jax.search.answer import Answer, Query, Searcher
from sicot_jax.search.category import CategoryFusion, read_fusion
from sicot_jax.search.ranker import Ranker, read_ranker
from sicot_jax.weights.bundle import WeightsBundle, read_bundle

NUM_SIMILAR = 20  # similar products of an answer
ALL_MODULES = "all modules"
WHOLE_PHOTO = "whole photos instead of the box"
_BATCH_SIZE = 32


class _ExactSearch:
    """An index that puts all photos in order by their features."""

    def __init__(self, index: ProductIndex):
        self._index = index

    def nearest(self, embeddings: np.ndarray, k: int, **options: Any) -> list[Neighbours]:
        candidates = self._index.manifest.num_photos
        return self._index.nearest(embeddings, k, **options, candidates=candidates)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


@dataclasses.dataclass(frozen=True)
class AblationSettings:
    """A search with one module switched off.

    Attributes:
      searcher: what answers.
      any_category: ignore the predicted category.
      whole_photo: embed the photo without the model's box.
    """

    searcher: Searcher
    any_category: bool = False
    whole_photo: bool = False


def ablations(
    index: ProductIndex,
    fusion: CategoryFusion | None,
    ranker: Ranker | None = None,
    *,
    has_box: bool = False,
) -> dict[str, AblationSettings]:
    """Lists the full search, and the search without each module that the index has.

    Args:
      index: the index.
      fusion: its category prediction.
      ranker: its ranker.
      has_box: whether its model localises the product.

    Returns:
      Name -> settings, `ALL_MODULES` first.
    """
    full = Searcher(index, category_fusion=fusion, ranker=ranker)

    def without(**changes: Any) -> AblationSettings:
        return AblationSettings(dataclasses.replace(full, **changes))

    settings = {ALL_MODULES: AblationSettings(full)}
    if fusion:
        settings["similar products of all categories"] = without(
            category_fusion=dataclasses.replace(fusion, confident_from=None)
        )
        settings["products not weighted by category"] = without(
            category_fusion=dataclasses.replace(fusion, rescaling_exponent=0.0)
        )
        settings["no category"] = AblationSettings(full, any_category=True)
    if ranker:
        settings["similar products nearest first"] = without(ranker=None)
    settings["exact search instead of codes"] = without(index=_ExactSearch(index))
    if has_box:
        settings[WHOLE_PHOTO] = AblationSettings(full, whole_photo=True)
    return settings


# An answer, and the photo's SKU and category -> a number from 0 to 1.
Measure = Callable[[Answer, str, str], float]


def _recognized(k: int) -> Measure:
    return lambda answer, sku, category: float(
        sku in [match.product.sku for match in answer.matches[:k]]
    )


def _retrieved(k: int) -> Measure:
    return lambda answer, sku, category: float(
        sku in [scored.product.sku for scored in answer.similar[:k]]
    )


def _same_category(answer: Answer, sku: str, category: str) -> float:
    matches = sum(scored.product.category == category for scored in answer.similar)
    return matches / max(len(answer.similar), 1)


MEASURES: dict[str, Measure] = {
    "recognised, top-1": _recognized(1),
    "recognised, top-5": _recognized(5),
    "same product first": _retrieved(1),
    "same product in 5": _retrieved(5),
    "same product in 20": _retrieved(NUM_SIMILAR),
    "of the same category": _same_category,
}


def evaluate_search(indexes: Sequence[Path], path: str) -> str:
    """Measures the search and every ablation on the test photos of a catalogue.

    Args:
      indexes: index folders, of runs of several seeds on the catalogue.
      path: folder of the imported catalogue.

    Returns:
      Markdown table, per cent; rows below the first are differences from it, with 95 % bootstrap
      intervals over photos and seeds.

    Raises:
      InputError: an index of another catalogue, or indexes with different modules.
    """
    catalog = open_catalog(DataConfig(source="imported", path=path))
    seeds = [_evaluate_index(index, catalog) for index in indexes]
    if any(list(seed) != list(seeds[0]) for seed in seeds):
        raise InputError(
            f"{indexes[0]}: some of these indexes have categories (of enough validation photos), "
            "a ranker or a box, others not; give indexes that were made in the same way"
        )
    full = np.stack([seed[ALL_MODULES] for seed in seeds])
    rows = [[ALL_MODULES, *(f"{100 * full[..., m].mean():.2f}" for m in range(len(MEASURES)))]]
    for name in list(seeds[0])[1:]:
        difference = np.stack([seed[name] for seed in seeds]) - full
        rows.append([name, *(_cell(difference[..., m]) for m in range(len(MEASURES)))])
    header = [
        f"{catalog.name}, {full.shape[1]} test photos, {len(indexes)} seeds",
        *(f"{name}, %" for name in MEASURES),
    ]
    return markdown_table(header, rows)


def _cell(difference: np.ndarray) -> str:
    low, high = (100 * x for x in paired_interval(difference))
    return f"{100 * difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]" if difference.any() else "0"


def _evaluate_index(folder: Path, catalog: Catalog) -> dict[str, np.ndarray]:
    """Name of the ablation -> float64 [photos, measures]."""
    version = layout.current_version(folder)
    index = open_index(version)
    if index.manifest.data_hash != catalog.data_hash:
        raise InputError(
            f"{folder}: of another catalogue than {catalog.name}; give the one it was built from"
        )
    split, values = catalog.splits["test"], list[list[list[float]]]()
    with contextlib.closing(index):
        converted = read_bundle(version / layout.MODEL)
        settings = ablations(
            index,
            read_fusion(version / layout.CATEGORY_FUSION),
            read_ranker(version / layout.RANKER),
            has_box=converted.model.localization != "none",
        )
        photos = _embed_photos(converted, split)
        for photo in tqdm(photos, total=len(split), desc=folder.name, disable=None):
            answers = [_answer(one, photo) for one in settings.values()]
            values.append(
                [
                    [measure(answer, photo.sku, photo.category) for measure in MEASURES.values()]
                    for answer in answers
                ]
            )
    return dict(zip(settings, np.swapaxes(np.array(values), 0, 1), strict=True))


@dataclasses.dataclass(frozen=True)
class _TestPhoto:
    """Model outputs with and without the box, SKU and category."""

    outputs: EngineOutputs
    whole_outputs: EngineOutputs
    sku: str
    category: str


def _answer(settings: AblationSettings, photo: _TestPhoto) -> Answer:
    outputs = photo.whole_outputs if settings.whole_photo else photo.outputs
    return settings.searcher.answer(
        Query(
            outputs.embedding,
            outputs.logits,
            k=5,
            num_similar=NUM_SIMILAR,
            any_category=settings.any_category,
        )
    )


def _embed_photos(converted: WeightsBundle, split: Split) -> Iterator[_TestPhoto]:
    engine = jax_engine(converted)
    without_box = dataclasses.replace(
        converted, model=dataclasses.replace(converted.model, localization="none")
    )
    whole_engine = engine if without_box == converted else jax_engine(without_box)
    for first in range(0, len(split), _BATCH_SIZE):
        records = [split[i] for i in range(first, min(first + _BATCH_SIZE, len(split)))]
        photos = converted.preprocessing.batch([record["image"] for record in records])
        outputs = engine(photos)
        whole_outputs = outputs if whole_engine is engine else whole_engine(photos)
        for record, one, other in zip(
            records, outputs.per_photo(), whole_outputs.per_photo(), strict=True
        ):
            yield _TestPhoto(one, other, record["sku"], record["category"])
