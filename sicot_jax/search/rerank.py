"""Similar products in the order of what visitors will want of them: likeness together with quality, learned from events.

    E[y] = p exp(score),   y = clicks + 5 purchases of a product in a list,   p = how often its position is looked at

by gradient-boosted trees over `quality.FEATURES` with Poisson's loss of y / p (inverse propensities; Joachims et al. 2017,
arXiv:1608.04468), each line with weight p: what is hardly looked at says little, and unweighted one click there would decide.
Trees are LightGBM's (Ke et al. 2017), which learn at each split where products go of which a number is not known.

Of two products that differ in likeness, sales, conversion or rating alone, the one with more never comes later: events are few
where lists are new, and candidates are ranked that no list has shown yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.files import read_json, write_json
from sicot_jax.search.quality import FEATURES, Described, Usual, features

FORMAT = 1
PURCHASE = 5.0  # clicks that a purchase counts as
SHOWN = 20  # places of a list that count
_RISING = {"likeness": 1, "behind": -1, "sales": 1, "conversion": 1, "rating": 1}
TREES = 200
_ROUNDS = 10  # of fits, to tell how often positions are looked at
_LEAST = 0.01  # so often each one is
SETTINGS = {
    "objective": "poisson",
    "num_leaves": 3,
    "learning_rate": 0.1,
    "min_data_in_leaf": 50,
    "monotone_constraints": [_RISING.get(name, 0) for name in FEATURES],
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "seed": 0,
    "verbosity": -1,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Products that were shown, a line each. rows: float64 [N, `FEATURES`]; of_list: int [N], number of its list, rising;
    position: int [N], in its list, from 0; wanted: y, float64 [N].
    """

    rows: np.ndarray
    of_list: np.ndarray
    position: np.ndarray
    wanted: np.ndarray

    def where(self, chosen: np.ndarray) -> Lists:
        return Lists(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Ranker:
    """model: sha256 of the recogniser's weights, whose cosines it has learned; version: of all of it; report: as `sicot index
    rank` told it.
    """

    model: str
    usual: Usual
    trees: Any  # lightgbm.Booster
    report: dict[str, Any]
    version: str = ""

    def scores(self, likeness: np.ndarray, products: Sequence[Described]) -> np.ndarray:
        """Of one list of candidates, cosines [N] and their products -> float64 [N], what is wanted most has the most."""
        return predict(self.trees, features(likeness, products, self.usual))


def fit(lists: Lists, looked_at: np.ndarray) -> Any:
    """A lightgbm.Booster. looked_at: p of each position, float64 [positions]."""
    lightgbm = _import_lightgbm()
    looked = looked_at[lists.position]
    names = [name.replace(" ", "_") for name in FEATURES]
    data = lightgbm.Dataset(lists.rows, lists.wanted / looked, weight=looked, feature_name=names)
    return lightgbm.train(SETTINGS, data, TREES)


def looked_at(lists: Lists) -> np.ndarray:
    """p of each position, 1 of the first, from lists alone: of E[y] = p exp(score) one side after the other is fitted, trees to
    what p leaves, p_k = sum of y / sum of exp(score) over lines at position k, which are the most likely ones each time.

    It can tell both apart as far as alike products stand at different positions of different lists.
    """
    found, wanted = np.ones(lists.position.max() + 1), np.bincount(lists.position, lists.wanted)
    for _ in range(_ROUNDS):
        expected = np.exp(predict(fit(lists, found), lists.rows))
        found = np.maximum(wanted / np.bincount(lists.position, expected), _LEAST)
        found = np.minimum(found / found[0], 1.0)
    return found


def predict(trees: Any, rows: np.ndarray) -> np.ndarray:
    """float64 [N]. One thread: LightGBM's own take milliseconds to wake up."""
    if not len(rows):
        return np.zeros(0)
    return trees.predict(rows, raw_score=True, num_threads=1)


def ndcg(gains: np.ndarray, k: int = SHOWN) -> float:
    """Of one list's gains [N] in the order it has: sum_i g_i / log2(i + 1) over its first k places, divided by the most that
    any order has; nan without a gain (Järvelin & Kekäläinen 2002, with gains as they are).
    """
    gains = np.asarray(gains, np.float64)
    discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
    best = float(np.sort(gains)[::-1][: len(discount)] @ discount)
    return float(gains[: len(discount)] @ discount) / best if best > 0 else float("nan")


def ndcgs(scores: np.ndarray, of_list: np.ndarray, gains: np.ndarray, k: int = SHOWN) -> np.ndarray:
    """Of each list, whose number `of_list` [N] has, put in order by scores [N]; without those that have no gain."""
    order = np.lexsort((-scores, of_list))  # stable: equal ones stay as they were shown
    pieces = np.split(gains[order], np.flatnonzero(np.diff(of_list)) + 1)
    found = np.array([ndcg(piece, k) for piece in pieces])
    return found[~np.isnan(found)]


def write_ranker(path: Path, ranker: Ranker) -> str:
    """Whole or not at all; its version."""
    stored = {
        "format": FORMAT,
        "model": ranker.model,
        "features": list(FEATURES),
        "prices": ranker.usual.prices,
        "words": sorted(ranker.usual.words),
        "report": ranker.report,
        "trees": ranker.trees.model_to_string(),
    }
    version = _digest(stored)
    write_json(path, stored | {"sha256": version})
    return version


def read_ranker(path: Path) -> Ranker | None:
    """None where there is none. InputError for a file of another format, or a damaged one."""
    if not path.exists():
        return None
    stored = read_json(path, "the ranker of an index")
    again = "give `sicot index rank` again"
    if stored.get("format") != FORMAT or stored.get("features") != list(FEATURES):
        raise InputError(f"{path}: of another format, this version reads {FORMAT}; {again}")
    version = stored.pop("sha256", None)
    if version != _digest(stored):
        raise InputError(f"{path}: not as it was written (another sha256); {again}")
    trees = _import_lightgbm().Booster(model_str=stored["trees"])
    usual = Usual(stored["prices"], frozenset(stored["words"]))
    return Ranker(stored["model"], usual, trees, stored["report"], version)


def _digest(stored: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _import_lightgbm() -> Any:
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # the library, or one of the system's that it needs
        raise InputError(f"no lightgbm here to rank with ({error}); pip install 'sicot_jax[service]'") from error
    return lightgbm
