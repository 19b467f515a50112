"""Similar products in the order of what visitors will want of them: likeness together with quality,
learned from events.

    E[y] = p exp(score),   y = clicks + 5 purchases of a product in a list,   p = how often its
    position is looked at

by a regression of the features, and gradient-boosted trees that learn what it leaves; both with
Poisson's loss of y / p (inverse propensities; Joachims et al. 2017, arXiv:1608.04468), each line
with weight p: what is hardly looked at says little, and unweighted one click there would decide.
Trees are LightGBM's (Ke et al. 2017), which learn at each split where products go of which a number
is not known; the regression has a term for that. Trees that feed a logistic regression (He et al.
2014), trees alone and a regression alone are rows of docs/search.md.

Of two products that differ in likeness, sales, conversion or rating alone, the one with more never
  comes later: events are few where lists are new, and candidates are ranked that no list has shown
  yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.errors import InputError
from sicot_jax.search.ranking_features import FEATURES, Described, Usual, features

FORMAT = 1
PURCHASE = 5.0  # clicks that a purchase counts as
SHOWN = 20  # places of a list that count
_RISING = {"likeness": 1, "behind": -1, "sales": 1, "conversion": 1, "rating": 1}
TREES = 50
PENALTY = 0.01  # of the regression, on squared weights of features made comparable
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
    """Products that were shown, a line each. rows: float64 [N, `FEATURES`]; of_list: int [N],
    number of its list, rising;
    position: int [N], in its list, from 0; wanted: y, float64 [N].
    """

    rows: np.ndarray
    of_list: np.ndarray
    position: np.ndarray
    wanted: np.ndarray

    def where(self, chosen: np.ndarray) -> Lists:
        return Lists(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """sum_i w_i (x_i - middle_i) / scale_i, or `unknown_i` where x_i is NaN, and an intercept;
    float64 [`FEATURES`].
    """

    middle: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    unknown: np.ndarray
    intercept: np.ndarray  # []

    @classmethod
    def fit(cls, rows: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Line:
        """By Poisson regression; a weight that would have more of a rising feature come later is 0."""
        from sklearn.linear_model import PoissonRegressor

        known = ~np.isnan(rows)
        count = np.maximum(known.sum(0), 1)
        middle = np.where(known, rows, 0).sum(0) / count
        scale = np.sqrt(np.where(known, (rows - middle) ** 2, 0).sum(0) / count)
        bare = cls(
            middle,
            np.where(scale > 0, scale, 1.0),
            np.zeros(len(middle)),
            np.zeros(len(middle)),
            np.zeros(()),
        )
        model = PoissonRegressor(alpha=PENALTY, solver="newton-cholesky")
        model.fit(np.hstack([bare._comparable(rows), ~known]), target, sample_weight=weight)
        weights, unknown = np.split(model.coef_, 2)
        weights = np.where(weights * SETTINGS["monotone_constraints"] < 0, 0.0, weights)
        return dataclasses.replace(
            bare, weights=weights, unknown=unknown, intercept=np.asarray(model.intercept_)
        )

    def _comparable(self, rows: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(rows), 0.0, (rows - self.middle) / self.scale)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[N, `FEATURES`] -> float64 [N]."""
        return (
            self._comparable(rows) @ self.weights + np.isnan(rows) @ self.unknown + self.intercept
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """line: what features say one by one; trees: a lightgbm.Booster, of what that leaves."""

    line: Line
    trees: Any

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[N, `FEATURES`] -> scores float64 [N]. One thread: LightGBM's own take milliseconds to
        wake up.
        """
        if not len(rows):
            return np.zeros(0)
        return self.line(rows) + self.trees.predict(rows, raw_score=True, num_threads=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranker:
    """recogniser: sha256 of its weights, whose cosines the model has learned; version: of all of
    it; report: as `sicot index rank` told it.
    """

    recogniser: str
    usual: Usual
    model: Model
    report: dict[str, Any]
    version: str = ""

    def scores(self, likeness: np.ndarray, products: Sequence[Described]) -> np.ndarray:
        """Of one list of candidates, cosines [N] and their products -> float64 [N], what is wanted
        most has the most.
        """
        return self.model(features(likeness, products, self.usual))


def fit(lists: Lists, looked_at: np.ndarray) -> Model:
    """looked_at: p of each position, float64 [positions]."""
    lightgbm = _import_lightgbm()
    looked = looked_at[lists.position]
    names = [name.replace(" ", "_") for name in FEATURES]
    line = Line.fit(lists.rows, lists.wanted / looked, looked)
    data = lightgbm.Dataset(
        lists.rows,
        lists.wanted / looked,
        weight=looked,
        init_score=line(lists.rows),
        feature_name=names,
    )
    return Model(line, lightgbm.train(SETTINGS, data, TREES))


def looked_at(lists: Lists) -> np.ndarray:
    """p of each position, 1 of the first, from lists alone: one side of E[y] = p exp(score) is
    fitted after the other, a line to y / p, then p_k = sum of y / sum of exp(score) over position
    k, its most likely value (as Wang et al. 2018, doi:10.1145/3159652.3159732, for searches that
    nobody repeats: a visitor's photo is asked with once, so events/position, which compares places
    of the same thing for the same query, has nothing to compare).

    It can tell the two apart as far as products of the same numbers stand at different positions of
    different lists.
    """
    found, wanted = np.ones(lists.position.max() + 1), np.bincount(lists.position, lists.wanted)
    for _ in range(_ROUNDS):
        looked = found[lists.position]
        expected = np.exp(Line.fit(lists.rows, lists.wanted / looked, looked)(lists.rows))
        found = np.maximum(wanted / np.bincount(lists.position, expected), _LEAST)
        found = np.minimum(found / found[0], 1.0)
    return found


def ndcg(gains: np.ndarray, k: int = SHOWN) -> float:
    """Of one list's gains [N] in the order it has: sum_i g_i / log2(i + 1) over its first k places,
    divided by the most that any order has; nan without a gain (Järvelin & Kekäläinen 2002, with
    gains as they are).
    """
    gains = np.asarray(gains, np.float64)
    discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
    best = float(np.sort(gains)[::-1][: len(discount)] @ discount)
    return float(gains[: len(discount)] @ discount) / best if best > 0 else float("nan")


def ndcgs(scores: np.ndarray, of_list: np.ndarray, gains: np.ndarray, k: int = SHOWN) -> np.ndarray:
    """Of each list, whose number `of_list` [N] has, put in order by scores [N]; without those that
    have no gain.
    """
    order = np.lexsort((-scores, of_list))  # stable: equal ones stay as they were shown
    pieces = np.split(gains[order], np.flatnonzero(np.diff(of_list)) + 1)
    found = np.array([ndcg(piece, k) for piece in pieces])
    return found[~np.isnan(found)]


def write_ranker(path: Path, ranker: Ranker) -> str:
    """Whole or not at all; its version."""
    stored = {
        "format": FORMAT,
        "recogniser": ranker.recogniser,
        "features": list(FEATURES),
        "prices": ranker.usual.prices,
        "words": sorted(ranker.usual.words),
        "report": ranker.report,
        "line": {name: value.tolist() for name, value in vars(ranker.model.line).items()},
        "trees": ranker.model.trees.model_to_string(),
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
    line = Line(*(np.asarray(stored["line"][field.name]) for field in dataclasses.fields(Line)))
    usual = Usual(stored["prices"], frozenset(stored["words"]))
    return Ranker(stored["recogniser"], usual, Model(line, trees), stored["report"], version)


def _digest(stored: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _import_lightgbm() -> Any:
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # the library, or one of the system's that it needs
        raise InputError(
            f"no lightgbm here to rank with ({error}); pip install 'sicot_jax[service]'"
        ) from error
    return lightgbm
