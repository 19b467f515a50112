"""`sicot index rank`: fits the ranker of the version in use to events and kept query photos.

A list counts where its query photo is still there. Similarities are those of the index's model, and
quality numbers those of now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.common.text import markdown_table
from sicot_jax.errors import InputError
from sicot_jax.events.bots import BotLimits, find_bots, visitor_days
from sicot_jax.events.store import PURCHASE_WEIGHT, Event, open_events, query_photos
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductRecord, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.add import open_index_engine
from sicot_jax.search.ranker import (
    NDCG_CUTOFF,
    Ranker,
    RankingLists,
    RankingModel,
    fit_examination_propensity,
    fit_ranking_model,
    import_lightgbm,
    ndcg_per_list,
    write_ranker,
)
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features
from sicot_jax.weights.bundle import read_bundle


@dataclasses.dataclass
class ShownList:
    """A list that a visitor was shown.

    Attributes:
      time: Unix time, seconds.
      request_id: request that it answered.
      query_image_id: id of the query photo.
      visitor: who saw it.
      shown: SKUs in order, each once.
      gain: SKU -> gain, of those that were clicked or bought.
    """

    time: float
    request_id: str
    query_image_id: str
    visitor: str
    shown: tuple[str, ...]
    gain: dict[str, float]


def shown_lists(events: Iterable[Event], limits: BotLimits | None = None) -> list[ShownList]:
    """Joins impressions with the clicks and purchases of their products.

    A click on a product that was not shown counts for nothing. Lists of bots are left out.

    Args:
      events: events of any number of machines, in any order.
      limits: limits of the bot filter; None for the standard ones.

    Returns:
      Lists by time.
    """
    limits = limits or BotLimits()
    lists, gains = dict[str, ShownList](), dict[tuple[str, str], float]()

    def collect() -> Iterator[Event]:
        for event in events:
            if event.kind == "impression":
                shown = tuple(dict.fromkeys(event.shown))
                entry = ShownList(
                    event.time, event.request_id, event.query_image_id, event.visitor, shown, {}
                )
                lists.setdefault(event.request_id, entry)
            else:  # another machine may have shown it
                key = event.request_id, event.sku
                gain = PURCHASE_WEIGHT if event.kind == "purchase" else 1.0
                gains[key] = max(gains.get(key, 0.0), gain)
            yield event

    days = visitor_days(collect(), min_events=limits.min_suspicious_events)
    for (request_id, sku), gain in gains.items():
        if request_id in lists and sku in lists[request_id].shown:
            lists[request_id].gain[sku] = gain
    bots = set[str]().union(*find_bots(days, limits).values())
    return sorted(
        (entry for entry in lists.values() if entry.visitor not in bots),
        key=lambda entry: entry.time,
    )


MAX_LISTS = 100_000  # the latest ones
MIN_CLICKED_LISTS = 100  # to fit, and of held-out visitors
_HELD_OUT = 5  # one visitor of so many
_BATCH_SIZE = 32
_CACHED_PRODUCTS = 4096
# Features that are shuffled together: they are computed from the same number.
_GROUPS = {
    "similarity gap": "similarity",
    "title words": "title",
    "common words": "title",
}

_ListWithPhoto = tuple[ShownList, Path]


def fit_index_ranker(
    index: Path, events: Sequence[Path], queries: Path, limits: BotLimits | None = None
) -> str:
    """Fits the ranker and writes it where it is better than similarity on held-out visitors.

    Args:
      index: index folder.
      events: event files of the service, or folders of `sicot events import`.
      queries: folder of `sicot serve --keep-queries`, or photos named by their query_image_id.
      limits: limits beyond which a visitor is a bot and left out; None for the standard ones.

    Returns:
      The report, Markdown.

    Raises:
      InputError: too few clicked lists whose photo is there, a ranker that is not better, or an
        index that was rebuilt in the meantime; the previous ranker stays.
    """
    import_lightgbm()  # fails here without it, before any photo is embedded
    folder = layout.current_version(index)
    manifest = layout.read_unsharded_manifest(folder)
    photo_of = query_photos(queries)
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(open_events(path))) for path in events]
        all_lists = shown_lists(itertools.chain.from_iterable(stores), limits)
    with_photo = [
        (shown, path)
        for shown in all_lists
        if (path := photo_of(shown.request_id, shown.query_image_id)) is not None
    ][-MAX_LISTS:]
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as store:
        statistics = CatalogStatistics.from_products(store.all_products())
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        lists, held_out = _ranking_lists(folder, store, vectors, with_photo, statistics)
    train, test = lists.select(~held_out), lists.select(held_out)
    for part, purpose in ((train, "to learn from"), (test, "of visitors that are held out")):
        if (count := len(np.unique(part.list_id[part.gain > 0]))) < MIN_CLICKED_LISTS:
            raise InputError(
                f"{count} lists {purpose} that were clicked on and whose photo is in {queries} "
                f"({len(with_photo)} of {len(all_lists)} lists have one), wanted "
                f"{MIN_CLICKED_LISTS}; give more --events, or serve with --keep-queries for longer"
            )
    propensity = fit_examination_propensity(train)
    model = fit_ranking_model(train, propensity)
    report = {
        "lists": len(with_photo),
        "lists_without_photo": len(all_lists) - len(with_photo),
        **_evaluate(model, test, propensity),
    }
    if report["ndcg_difference"][1] <= 0:
        raise InputError(
            f"not shown to be better than similarity ({_summary(report)}); nothing was written, "
            "more events may help"
        )
    with layout.write_lock(index):
        if layout.current_version(index) != folder:
            raise InputError(f"{index}: was rebuilt in the meantime; run the command again")
        ranker = Ranker(manifest.model_sha256, statistics, model, report)
        version = write_ranker(folder / layout.RANKER, ranker)
    return (
        f"{_importance_table(report)}\n{_summary(report)}\n{folder / layout.RANKER}: {version[:12]}"
    )


def _ranking_lists(
    folder: Path,
    store: ProductStore,
    vectors: VectorFiles,
    with_photo: Sequence[_ListWithPhoto],
    statistics: CatalogStatistics,
) -> tuple[RankingLists, np.ndarray]:
    """Features and gains of all shown products, and which are of held-out visitors.

    A list whose photo cannot be read is left out, as are deleted products.
    """
    similarity, record_of = _ProductSimilarity(store, vectors), _cached_records(store)
    features, list_id, position, gain, held_out = [], [], [], [], []
    for number, (shown, embedding) in enumerate(_embed_queries(folder, with_photo)):
        records = [
            (rank, record)
            for rank, record in enumerate(map(record_of, shown.shown))
            if record is not None
        ]
        if not records:
            continue
        cosines = np.array([similarity(embedding, record.product_id) for _, record in records])
        features.append(ranking_features(cosines, [record for _, record in records], statistics))
        list_id += [number] * len(records)
        position += [rank for rank, _ in records]
        gain += [shown.gain.get(record.sku, 0.0) for _, record in records]
        held_out += [zlib.crc32(shown.visitor.encode()) % _HELD_OUT == 0] * len(records)
    lists = RankingLists(
        np.concatenate([np.zeros((0, len(FEATURES))), *features]),
        np.array(list_id, int),
        np.array(position, int),
        np.array(gain, float),
    )
    return lists, np.array(held_out, bool)


def _embed_queries(
    folder: Path, with_photo: Sequence[_ListWithPhoto]
) -> Iterator[tuple[ShownList, np.ndarray]]:
    """Lists with the unit embedding of their photo, float32 [D]."""
    preprocessing = read_bundle(folder / layout.MODEL).preprocessing
    engine = open_index_engine(folder)
    for first in range(0, len(with_photo), _BATCH_SIZE):
        lists, photos = [], []
        for shown, path in with_photo[first : first + _BATCH_SIZE]:
            # Photos expire, and may be damaged.
            with contextlib.suppress(OSError, InputError):
                photos.append(preprocessing.centre_crop(preprocessing.load(path.read_bytes())))
                lists.append(shown)
        if photos:
            embeddings = engine(np.stack(photos)).embedding
            yield from zip(lists, l2_normalize(embeddings), strict=True)


class _ProductSimilarity:
    """Cosine of an embedding with the nearest photo of a product."""

    def __init__(self, store: ProductStore, vectors: VectorFiles):
        features = vectors.memmap(layout.FEATURES, store.num_rows())
        query = (
            "SELECT row FROM photos WHERE product_id = ? AND NOT deleted AND row < ? ORDER BY row"
        )

        @functools.lru_cache(_CACHED_PRODUCTS)
        def features_of(product_id: int) -> np.ndarray:
            lines = store.connection.execute(query, (product_id, len(features)))
            return features[[line[0] for line in lines]].astype(np.float32)

        self._features_of = features_of

    def __call__(self, embedding: np.ndarray, product_id: int) -> float:
        return float(np.max(self._features_of(product_id) @ embedding, initial=-1.0))


def _cached_records(store: ProductStore) -> Callable[[str], ProductRecord | None]:
    @functools.lru_cache(_CACHED_PRODUCTS)
    def record_of(sku: str) -> ProductRecord | None:
        return store.product(sku)

    return record_of


def _evaluate(model: RankingModel, test: RankingLists, propensity: np.ndarray) -> dict[str, Any]:
    """NDCG of held-out lists by similarity and by the ranker, and the loss of shuffled features."""
    gains = test.gain / propensity[test.position]

    def ndcg_by(scores: np.ndarray) -> np.ndarray:
        return ndcg_per_list(scores, test.list_id, gains)

    by_similarity, by_ranker = ndcg_by(test.features[:, 0]), ndcg_by(model(test.features))
    rng, importance = np.random.default_rng(0), {}
    for group in dict.fromkeys(_GROUPS.get(name, name) for name in FEATURES):
        columns = [n for n, name in enumerate(FEATURES) if _GROUPS.get(name, name) == group]
        shuffled = test.features.copy()
        shuffled[:, columns] = rng.permutation(test.features[:, columns])
        importance[group] = {
            "known": float(np.isfinite(test.features[:, columns]).any(1).mean()),
            "ndcg_loss": float(by_ranker.mean() - ndcg_by(model(shuffled)).mean()),
        }
    difference = by_ranker - by_similarity
    return {
        "held_out_lists": len(by_ranker),
        "ndcg_by_similarity": float(by_similarity.mean()),
        "ndcg": float(by_ranker.mean()),
        "ndcg_difference": [float(difference.mean()), *paired_interval(difference)],
        "propensity": np.round(propensity, 4).tolist(),
        "importance": importance,
    }


def _summary(report: dict[str, Any]) -> str:
    mean, low, high = report["ndcg_difference"]
    return (
        f"NDCG@{NDCG_CUTOFF} on {report['held_out_lists']} lists of visitors that were held out: "
        f"{report['ndcg']:.3f}, by similarity {report['ndcg_by_similarity']:.3f}: "
        f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]; lists without a photo, left out: "
        f"{report['lists_without_photo']}"
    )


def _importance_table(report: dict[str, Any]) -> str:
    by_loss = sorted(report["importance"].items(), key=lambda item: -item[1]["ndcg_loss"])
    rows = [
        [name, f"{100 * group['known']:.0f}", f"{group['ndcg_loss']:+.4f}"]
        for name, group in by_loss
    ]
    return markdown_table(["feature", "known of, %", "NDCG lost when shuffled"], rows)
