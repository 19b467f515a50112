"""`sicot index rank`: what visitors did with the similar products they were shown, and the photos
they asked with -> the ranker of the version in use.

A list counts where its photo is there yet: the likeness of a product is that of now, by the model
  of the index, and so are prices, sales and the like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.common.markdown import markdown_table
from sicot_jax.errors import InputError
from sicot_jax.events.query_photos import query_photos
from sicot_jax.events.store import Event, opened
from sicot_jax.events.triplets import Limits
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import Product, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.update import open_engine
from sicot_jax.search.ndcg import NDCG_CUTOFF, ndcg_per_list
from sicot_jax.search.ranker import (
    PURCHASE_GAIN,
    Ranker,
    RankingLists,
    RankingModel,
    fit_examination_propensity,
    fit_ranking_model,
    write_ranker,
)
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features
from sicot_jax.weights import bundle as folders

MOST = 100_000  # lists that are learned from, the latest
FEWEST = 100  # lists that something was clicked or bought of, to learn from, and held out
_HELD_OUT = 5  # one visitor of so many
_BATCH = 32
LIMITS = Limits()
_CACHED = 4096  # products whose features are kept
_GROUPS = {
    "similarity gap": "similarity",
    "title words": "title",
    "common words": "title",
}  # features that tell of one thing


@dataclasses.dataclass
class View:
    """A list that was shown. wanted: y of those of its SKUs that were clicked or bought."""

    time: float
    request_id: str
    query_image_id: str
    visitor: str
    shown: tuple[str, ...]
    wanted: dict[str, float]


def rank(index: Path, events: Sequence[Path], queries: Path) -> str:
    """Fit the ranker, write it into the version in use if it is better than likeness on visitors
    that were held out, and tell what it came to. queries: the folder of `sicot serve
    --keep-queries`, or of photos named by their query_image_id.

    InputError: too few lists that were clicked on and whose photo is there, a ranker that is not
      better, an index that was built anew meanwhile; the ranker before stays.
    """
    folder = layout.current_version(index)
    manifest = layout.read_unsharded_manifest(folder)
    photo_of = query_photos(queries)
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(opened(path))) for path in events]
        every = views(itertools.chain.from_iterable(stores))
    found = [
        (view, path)
        for view in every
        if (path := photo_of(view.request_id, view.query_image_id)) is not None
    ][-MOST:]
    with contextlib.closing(ProductStore(folder / layout.PRODUCTS)) as cards:
        usual = CatalogStatistics.from_products(cards.all_products())
        lists, held_out = _lists(folder, manifest, cards, found, usual)
    learned, tested = lists.select(~held_out), lists.select(held_out)
    for part, what in ((learned, "to learn from"), (tested, "of visitors that are held out")):
        if (count := len(np.unique(part.list_id[part.gain > 0]))) < FEWEST:
            raise InputError(
                f"{count} lists {what} that were clicked on and whose photo is in {queries} ({len(found)} of {len(every)} "
                f"lists have one), wanted {FEWEST}; give more --events, or serve with --keep-queries for longer"
            )
    looked_at = fit_examination_propensity(learned)
    model = fit_ranking_model(learned, looked_at)
    report = {
        "lists": len(found),
        "without a photo": len(every) - len(found),
        **_report(model, tested, looked_at),
    }
    if report["difference"][1] <= 0:
        raise InputError(
            f"not shown to be better than likeness ({_told(report)}); nothing was written, more events may help"
        )
    with layout.write_lock(index):
        if layout.current_version(index) != folder:
            raise InputError(f"{index}: was built anew meanwhile; give the command again")
        version = write_ranker(
            folder / layout.RANKER, Ranker(manifest.model_sha256, usual, model, report)
        )
    return f"{_table(report)}\n{_told(report)}\n{folder / layout.RANKER}: {version[:12]}"


def views(events: Iterable[Event]) -> list[View]:
    """Lists with what came of them, by time, of events in any order; a click on what was not shown
    counts for nothing, and visitors who see or click more on a day than people do
    (`events.triplets.Limits`) are left out.
    """
    found, gained = dict[str, View](), dict[tuple[str, str], float]()
    seen, clicked = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for event in events:
        day = event.visitor, int(event.time // 86_400)
        seen[day] += event.kind == "impression"
        clicked[day] += event.kind == "click"
        if event.kind == "impression":
            shown = tuple(dict.fromkeys(event.shown))
            view = View(
                event.time, event.request_id, event.query_image_id, event.visitor, shown, {}
            )
            found.setdefault(event.request_id, view)
        else:  # another machine may have shown it
            key = event.request_id, event.sku
            gained[key] = max(
                gained.get(key, 0.0), PURCHASE_GAIN if event.kind == "purchase" else 1.0
            )
    for (request_id, sku), gain in gained.items():
        if request_id in found and sku in found[request_id].shown:
            found[request_id].wanted[sku] = gain
    bots = {day[0] for day, count in seen.items() if count > LIMITS.views}
    bots |= {day[0] for day, count in clicked.items() if count > LIMITS.clicks}
    return sorted(
        (view for view in found.values() if view.visitor not in bots), key=lambda view: view.time
    )


def _lists(
    folder: Path,
    manifest: layout.IndexManifest,
    cards: ProductStore,
    found: Sequence[tuple[View, Path]],
    usual: CatalogStatistics,
) -> tuple[RankingLists, np.ndarray]:
    """And which lines are of visitors that are held out. A photo that cannot be read takes its list
    along, a product that is not offered any more its line.
    """
    likeness, card = _Likeness(folder, manifest, cards), _cards(cards)
    rows, of_list, position, wanted, held_out = [], [], [], [], []
    for number, (view, embedding) in enumerate(_embedded(folder, found)):
        there = [
            (n, product) for n, product in enumerate(map(card, view.shown)) if product is not None
        ]
        if not there:
            continue
        alike = np.array([likeness(embedding, product.product) for _, product in there])
        rows.append(ranking_features(alike, [product for _, product in there], usual))
        of_list += [number] * len(there)
        position += [n for n, _ in there]
        wanted += [view.wanted.get(product.sku, 0.0) for _, product in there]
        held_out += [zlib.crc32(view.visitor.encode()) % _HELD_OUT == 0] * len(there)
    every = np.concatenate([np.zeros((0, len(FEATURES))), *rows])
    lists = RankingLists(
        every, np.array(of_list, int), np.array(position, int), np.array(wanted, float)
    )
    return lists, np.array(held_out, bool)


def _embedded(
    folder: Path, found: Sequence[tuple[View, Path]]
) -> Iterator[tuple[View, np.ndarray]]:
    """Unit embeddings float32 [D]."""
    preprocessing, engine = (
        folders.read_converted(folder / layout.MODEL).preprocessing,
        open_engine(folder),
    )
    for first in range(0, len(found), _BATCH):
        views, photos = [], []
        for view, path in found[first : first + _BATCH]:
            with contextlib.suppress(OSError, InputError):  # its days were over, or it is no photo
                photos.append(preprocessing.centre_crop(preprocessing.load(path.read_bytes())))
                views.append(view)
        if photos:
            yield from zip(views, l2_normalize(engine(np.stack(photos))[0]), strict=True)


class _Likeness:
    """Cosine of an embedding and the nearest photo of a product, as the index tells it."""

    def __init__(self, folder: Path, manifest: layout.IndexManifest, cards: ProductStore):
        vectors = VectorFiles(folder, manifest.width, manifest.bits)
        features, connection = vectors.memmap(layout.FEATURES, cards.ends()[0]), cards.connection

        @functools.lru_cache(_CACHED)
        def of(product: int) -> np.ndarray:
            find = "SELECT place FROM photos WHERE product = ? AND NOT withdrawn AND place < ? ORDER BY place"
            places = [row[0] for row in connection.execute(find, (product, len(features)))]
            return features[places].astype(np.float32)

        self._of = of

    def __call__(self, embedding: np.ndarray, product: int) -> float:
        return float(np.max(self._of(product) @ embedding, initial=-1.0))


def _cards(cards: ProductStore):
    @functools.lru_cache(_CACHED)
    def card(sku: str) -> Product | None:
        return cards.product(sku)

    return card


def _report(model: RankingModel, tested: RankingLists, looked_at: np.ndarray) -> dict[str, Any]:
    """NDCG of the held-out lists by likeness and by the ranker, and what is lost of it where a
    feature is shuffled.
    """
    gains = tested.gain / looked_at[tested.position]

    def by(scores: np.ndarray) -> np.ndarray:
        return ndcg_per_list(scores, tested.list_id, gains)

    likeness, ranked = by(tested.features[:, 0]), by(model(tested.features))
    rng, mattered = np.random.default_rng(0), {}
    for group in dict.fromkeys(_GROUPS.get(name, name) for name in FEATURES):
        columns = [n for n, name in enumerate(FEATURES) if _GROUPS.get(name, name) == group]
        shuffled = tested.features.copy()
        shuffled[:, columns] = rng.permutation(tested.features[:, columns])
        mattered[group] = {
            "known": float(np.isfinite(tested.features[:, columns]).any(1).mean()),
            "ndcg lost": float(ranked.mean() - by(model(shuffled)).mean()),
        }
    return {
        "held out": len(ranked),
        "ndcg by likeness": float(likeness.mean()),
        "ndcg": float(ranked.mean()),
        "difference": [float((ranked - likeness).mean()), *paired_interval(ranked - likeness)],
        "looked at": np.round(looked_at, 4).tolist(),
        "mattered": mattered,
    }


def _told(report: dict[str, Any]) -> str:
    middle, low, high = report["difference"]
    return (
        f"NDCG@{NDCG_CUTOFF} on {report['held out']} lists of visitors that were held out: {report['ndcg']:.3f}, by likeness "
        f"{report['ndcg by likeness']:.3f}: {middle:+.3f} [{low:+.3f}, {high:+.3f}]; lists without a photo, left out: "
        f"{report['without a photo']}"
    )


def _table(report: dict[str, Any]) -> str:
    rows = [
        [name, f"{100 * told['known']:.0f}", f"{told['ndcg lost']:+.4f}"]
        for name, told in sorted(report["mattered"].items(), key=lambda item: -item[1]["ndcg lost"])
    ]
    return markdown_table(["what mattered", "known of, %", "NDCG lost without"], rows)
