"""`sicot evaluate search`: what each module of the visual search adds, as each is switched off in turn, on test photos."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.opening import open_catalog
from sicot_jax.config import DataConfig
from sicot_jax.convert import folder as folders
from sicot_jax.errors import InputError
from sicot_jax.index import layout, recognition
from sicot_jax.index.embedded import EmbeddedIndex
from sicot_jax.index.product_index import Near
from sicot_jax.index.recognition import Answer
from sicot_jax.recognizer import jax_engine
from sicot_jax.report.document import markdown_table
from sicot_jax.report.intervals import paired_interval
from sicot_jax.search.category import Fusion, read_fusion

SHOWN = 20  # similar products
ALL = "all modules"
_BATCH = 32


class _Exact:
    """An index that puts all photos in order by their features."""

    def __init__(self, index: EmbeddedIndex):
        self._index = index

    def nearest(self, embeddings: np.ndarray, k: int, **more: Any) -> list[Near]:
        return self._index.nearest(embeddings, k, **more, candidates=self._index.manifest.photos)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One index and what its categories were fitted to; how it answers."""

    index: Any
    fusion: Fusion | None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def variants(index: EmbeddedIndex, fusion: Fusion | None) -> dict[str, Asked]:
    """`ALL`, and each module switched off."""
    found = {ALL: Asked(index, fusion)}
    if fusion:
        found["similar products of all categories"] = Asked(index, dataclasses.replace(fusion, sure=None))
        found["products not weighted by category"] = Asked(index, dataclasses.replace(fusion, strength=0.0))
        found["no category"] = Asked(index, fusion, {"any_category": True})
    return found | {"exact search in place of codes": Asked(_Exact(index), fusion)}


# A photo's answer, and its product and category -> a number from 0 to 1.
Measure = Callable[[Answer, str, str], float]


def _recognised(k: int) -> Measure:
    return lambda answer, sku, category: float(sku in [match.product.sku for match in answer.matches[:k]])


def _found(k: int) -> Measure:
    return lambda answer, sku, category: float(sku in [scored.product.sku for scored in answer.similar[:k]])


def _alike(answer: Answer, sku: str, category: str) -> float:
    return sum(scored.product.category == category for scored in answer.similar) / max(len(answer.similar), 1)


MEASURES: dict[str, Measure] = {
    "recognised, top-1": _recognised(1),
    "recognised, top-5": _recognised(5),
    "same product first": _found(1),
    "same product in 5": _found(5),
    "same product in 20": _found(SHOWN),
    "of the same category": _alike,
}


def evaluate(indexes: Sequence[Path], path: str) -> str:
    """Tables in Markdown. indexes: of runs of several seeds on the catalogue in `path`. Per cent of its test photos, 95 %
    intervals over photos and seeds; rows below the first are differences from it. InputError: an index of other data.
    """
    catalog = open_catalog(DataConfig(source="imported", path=path))
    seeds = [_of_index(index, catalog) for index in indexes]
    if any(list(one) != list(seeds[0]) for one in seeds):
        raise InputError(
            f"{indexes[0]}: some of these indexes have no categories (too few validation photos), others have"
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
    opened = EmbeddedIndex(version)
    if opened.manifest.data != catalog.data_hash:
        raise InputError(f"{index}: of another catalogue than {catalog.name}; give the one it was built from")
    split, found = catalog.splits["test"], list[list[list[float]]]()
    with contextlib.closing(opened):
        asked = variants(opened, read_fusion(version / layout.CATEGORIES))
        for embedding, logits, sku, category in tqdm(
            _photos(version, split), total=len(split), desc=index.name, disable=None
        ):
            answers = (
                recognition.answer(a.index, None, a.fusion, embedding, logits, k=5, similar=SHOWN, **a.more)
                for a in asked.values()
            )
            found.append([[measure(answer, sku, category) for measure in MEASURES.values()] for answer in answers])
    return dict(zip(asked, np.swapaxes(np.array(found), 0, 1), strict=True))


def _photos(version: Path, split: Any) -> Iterator[tuple[np.ndarray, np.ndarray, str, str]]:
    """Embedding, logits, SKU and category of each test photo."""
    converted = folders.read_converted(version / layout.MODEL)
    engine = jax_engine(converted)
    for first in range(0, len(split), _BATCH):
        records = [split[i] for i in range(first, min(first + _BATCH, len(split)))]
        found = engine(converted.preprocessing.batch([record["image"] for record in records]))
        for record, one in zip(records, found.each(), strict=True):
            yield one.embedding, one.logits, record["sku"], record["category"]
