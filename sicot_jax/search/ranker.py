"""Orders similar products by expected clicks and purchases, learned from events.

    E[gain] = p exp(score),   gain = clicks + 5 purchases of a product in a list,
                              p = probability that its position is examined

A Poisson regression of the features, then gradient-boosted trees on its residual; both minimise the
Poisson loss of gain / p (inverse propensity weighting; Joachims et al. 2017, arXiv:1608.04468) with
sample weight p: without it, one click at a position that is hardly examined would decide. Trees are
LightGBM's (Ke et al. 2017). To both, an unknown value is the mean of the known ones and an
indicator that it is unknown. LightGBM's own missing values are not used: where a feature is NaN or
positive in the training data, it scores zero and negative values as it scores NaN (4.7.0), so that
a product without a sale would be ranked as one whose sales nobody knows. Values beyond those of the
training data are scored as the nearest of these. Trees that feed a logistic regression (He et al.
2014), trees alone and the regression alone are measured in docs/results/ranking.md.

Scores are monotone: of two products that differ only in similarity, sales, conversion or rating,
both known, the one with more never ranks lower. New lists have few events, and candidates are
ranked that no list has shown yet.
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
from sicot_jax.search.ranking_features import (
    FEATURES,
    CatalogStatistics,
    DescribedProduct,
    ranking_features,
)

FORMAT = 3
NUM_TREES = 50
L2_PENALTY = 0.01  # of the regression, on squared coefficients of standardised features
_MONOTONE = {"similarity": 1, "similarity gap": -1, "sales": 1, "conversion": 1, "rating": 1}
_MONOTONE_SIGNS = [_MONOTONE.get(name, 0) for name in FEATURES]
_EM_STEPS = 10
_MIN_PROPENSITY = 0.01
TREE_PARAMS = {
    "objective": "poisson",
    "num_leaves": 3,
    "learning_rate": 0.1,
    "min_data_in_leaf": 50,
    "monotone_constraints": [*_MONOTONE_SIGNS, *(0 for _ in FEATURES)],  # of `inputs`
    "use_missing": False,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "seed": 0,
    "verbosity": -1,
}


@dataclasses.dataclass(frozen=True, eq=False)
class RankingLists:
    """Lists of similar products that were shown, one entry per product and list.

    Attributes:
      features: Ranking features, float64 [N, F].
      list_id: Number of the entry's list, ascending, int [N].
      position: Position in the list, from 0, int [N].
      gain: Clicks + 5 purchases, float64 [N].
    """

    features: np.ndarray
    list_id: np.ndarray
    position: np.ndarray
    gain: np.ndarray

    def select(self, mask: np.ndarray) -> RankingLists:
        """Returns some of the entries.

        Args:
          mask: Entries to keep, bool [N].

        Returns:
          The entries where `mask` is true.
        """
        return RankingLists(
            self.features[mask], self.list_id[mask], self.position[mask], self.gain[mask]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PoissonRegression:
    """Log-linear model of standardised features, with a coefficient for unknown values.

    log E = intercept + sum_i coef_i z_i, or missing_coef_i where x_i is NaN,
    z_i = (x_i - mean_i) / scale_i,  x_i clipped to [low_i, high_i]

    Attributes:
      mean: Mean of each feature, float64 [F].
      scale: Standard deviation of each feature, 1 where it is constant, float64 [F].
      low: Smallest known value of each feature, float64 [F].
      high: Greatest known value, float64 [F].
      coef: Coefficients, float64 [F].
      missing_coef: What replaces the term of an unknown feature, float64 [F].
      intercept: Float64 [].
    """

    mean: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    coef: np.ndarray
    missing_coef: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(
        cls, features: np.ndarray, target: np.ndarray, sample_weight: np.ndarray
    ) -> PoissonRegression:
        """Fits the regression; a coefficient that would violate a monotone constraint becomes 0.

        Args:
          features: Ranking features, float64 [N, F]; NaN where unknown.
          target: Non-negative target, float64 [N].
          sample_weight: Weights, float64 [N].

        Returns:
          The regression.
        """
        from sklearn.linear_model import PoissonRegressor

        present = ~np.isnan(features)
        count = np.maximum(present.sum(0), 1)
        mean = np.where(present, features, 0).sum(0) / count
        scale = np.sqrt(np.where(present, (features - mean) ** 2, 0).sum(0) / count)
        low = np.min(features, 0, where=present, initial=np.inf)
        high = np.max(features, 0, where=present, initial=-np.inf)
        never, zeros = low > high, np.zeros(len(mean))  # never known: its mean is 0
        unfitted = cls(
            mean,
            np.where(scale > 0, scale, 1.0),
            np.where(never, 0.0, low),
            np.where(never, 0.0, high),
            zeros,
            zeros,
            np.zeros(()),
        )
        model = PoissonRegressor(alpha=L2_PENALTY, solver="newton-cholesky")
        model.fit(unfitted.inputs(features), target, sample_weight=sample_weight)
        coef, missing_coef = np.split(model.coef_, 2)
        coef = np.where(coef * _MONOTONE_SIGNS < 0, 0.0, coef)
        intercept = np.asarray(model.intercept_)
        return dataclasses.replace(
            unfitted, coef=coef, missing_coef=missing_coef, intercept=intercept
        )

    def inputs(self, features: np.ndarray) -> np.ndarray:
        """Returns what regression and trees read of features.

        Args:
          features: Ranking features, float64 [N, F]; NaN where unknown.

        Returns:
          Standardised features, 0 where unknown, and 1 where unknown, 0 where known,
          float64 [N, 2 F].
        """
        unknown = np.isnan(features)
        known = (np.clip(features, self.low, self.high) - self.mean) / self.scale
        return np.hstack([np.where(unknown, 0.0, known), unknown])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns log expectations.

        Args:
          features: Ranking features, float64 [N, F].

        Returns:
          Float64 [N].
        """
        return self.inputs(features) @ np.append(self.coef, self.missing_coef) + self.intercept


@dataclasses.dataclass(frozen=True, eq=False)
class RankingModel:
    """Sum of a regression and of trees that were fitted to its residual.

    Attributes:
      regression: The log-linear part.
      trees: A `lightgbm.Booster`.
    """

    regression: PoissonRegression
    trees: Any

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns ranking scores, the log of the expected gain at an examined position.

        Args:
          features: Ranking features, float64 [N, F].

        Returns:
          Scores, float64 [N].
        """
        if not len(features):
            return np.zeros(0)
        # One thread: threads of LightGBM take milliseconds to wake up.
        trees = self.trees.predict(self.regression.inputs(features), raw_score=True, num_threads=1)
        return self.regression(features) + trees


@dataclasses.dataclass(frozen=True, eq=False)
class Ranker:
    """A ranking model with all that is needed to apply it.

    Attributes:
      recognizer: SHA-256 of the recogniser's weights, whose cosines the model has learned.
      catalog_statistics: Statistics that features are relative to.
      model: The ranking model.
      report: Measurements of `sicot index rank`.
      version: SHA-256 of everything above; empty before the ranker is written.
    """

    recognizer: str
    catalog_statistics: CatalogStatistics
    model: RankingModel
    report: dict[str, Any]
    version: str = ""

    def scores(self, similarity: np.ndarray, products: Sequence[DescribedProduct]) -> np.ndarray:
        """Returns the ranking scores of one list of candidates.

        Args:
          similarity: Cosine of each product to the query photo, float [N].
          products: The products, N of them.

        Returns:
          Scores, greatest first to show, float64 [N].
        """
        return self.model(ranking_features(similarity, products, self.catalog_statistics))


def fit_ranking_model(lists: RankingLists, propensity: np.ndarray) -> RankingModel:
    """Fits the regression and the trees with inverse propensity weighting.

    Args:
      lists: Lists that were shown, and their gains.
      propensity: Probability that each position is examined, float64 [positions].

    Returns:
      The model.

    Raises:
      InputError: LightGBM is not installed.
    """
    lightgbm = import_lightgbm()
    examined = propensity[lists.position]
    regression = PoissonRegression.fit(lists.features, lists.gain / examined, examined)
    names = [name.replace(" ", "_") for name in FEATURES]
    data = lightgbm.Dataset(
        regression.inputs(lists.features),
        lists.gain / examined,
        weight=examined,
        init_score=regression(lists.features),
        feature_name=[*names, *(f"{name}_unknown" for name in names)],
    )
    return RankingModel(regression, lightgbm.train(TREE_PARAMS, data, NUM_TREES))


def fit_examination_propensity(lists: RankingLists) -> np.ndarray:
    """Estimates from the lists alone how often each position is examined.

    Regression-based expectation maximisation (Wang et al. 2018, doi:10.1145/3159652.3159732): the
    two factors of E[gain] = p exp(score) are fitted in turn, a regression to gain / p, then
    p_k = sum of gains / sum of exp(score) over position k. It separates the two as far as products
    of equal features are at different positions of different lists. A visitor's photo is asked
    with once, so the comparison of positions for repeated queries (`events.propensity`) does not
    apply.

    Args:
      lists: Lists that were shown, and their gains.

    Returns:
      Propensity relative to the first position, float64 [positions], 0.01 to 1.
    """
    propensity = np.ones(lists.position.max() + 1)
    gain = np.bincount(lists.position, lists.gain)
    for _ in range(_EM_STEPS):
        examined = propensity[lists.position]
        regression = PoissonRegression.fit(lists.features, lists.gain / examined, examined)
        expected = np.bincount(lists.position, np.exp(regression(lists.features)))
        propensity = np.maximum(gain / expected, _MIN_PROPENSITY)
        propensity = np.minimum(propensity / propensity[0], 1.0)
    return propensity


def write_ranker(path: Path, ranker: Ranker) -> str:
    """Writes a ranker as JSON, atomically.

    Args:
      path: File to write.
      ranker: The ranker.

    Returns:
      Its version, the SHA-256 of the content.
    """
    regression = vars(ranker.model.regression)
    stored = {
        "format": FORMAT,
        "recognizer": ranker.recognizer,
        "features": list(FEATURES),
        "median_prices": ranker.catalog_statistics.median_prices,
        "common_words": sorted(ranker.catalog_statistics.common_words),
        "report": ranker.report,
        "regression": {name: value.tolist() for name, value in regression.items()},
        "trees": ranker.model.trees.model_to_string(),
    }
    version = _digest(stored)
    write_json(path, stored | {"sha256": version})
    return version


def read_ranker(path: Path) -> Ranker | None:
    """Reads a ranker.

    Args:
      path: File that `write_ranker` wrote.

    Returns:
      The ranker, or None without a file.

    Raises:
      InputError: The file is of another format or damaged, or LightGBM is not installed.
    """
    if not path.exists():
        return None
    stored = read_json(path, "the ranker of an index")
    advice = "run `sicot index rank` again"
    if stored.get("format") != FORMAT or stored.get("features") != list(FEATURES):
        raise InputError(f"{path}: of another format, this version reads {FORMAT}; {advice}")
    version = stored.pop("sha256", None)
    if version != _digest(stored):
        raise InputError(f"{path}: damaged, its sha256 does not match; {advice}")
    trees = import_lightgbm().Booster(model_str=stored["trees"])
    fields = dataclasses.fields(PoissonRegression)
    regression = PoissonRegression(*(np.asarray(stored["regression"][f.name]) for f in fields))
    statistics = CatalogStatistics(stored["median_prices"], frozenset(stored["common_words"]))
    model = RankingModel(regression, trees)
    return Ranker(stored["recognizer"], statistics, model, stored["report"], version)


def _digest(stored: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def import_lightgbm() -> Any:
    """Returns the module `lightgbm`; raises InputError where it is not installed."""
    try:
        import lightgbm
    except (ImportError, OSError) as error:  # the library, or a system library that it needs
        raise InputError(
            f"LightGBM is not installed ({error}); install it: pip install 'sicot_jax[service]'"
        ) from error
    return lightgbm


NDCG_CUTOFF = 20  # positions that count


def ndcg(gains: np.ndarray, k: int = NDCG_CUTOFF) -> float:
    """Returns NDCG@k of one list, with linear gains (Järvelin & Kekäläinen 2002).

    sum_i g_i / log2(i + 1) over the first k positions, divided by its value for the best order.
    Equal to scikit-learn's `dcg_score` of the list over that of its best order; not taken from
    there, because that validates its input for a millisecond a list (the ranker's report needs a
    million lists) and refuses lists of one product, and `ndcg_score` gives 0 for a list without
    any gain.

    Args:
      gains: Gain of each product, in the order of the list, float [N].
      k: Number of positions that count.

    Returns:
      NDCG, 0 to 1; NaN where no product has a gain.
    """
    gains = np.asarray(gains, np.float64)
    discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
    ideal = float(np.sort(gains)[::-1][: len(discount)] @ discount)
    return float(gains[: len(discount)] @ discount) / ideal if ideal > 0 else float("nan")


def ndcg_per_list(
    scores: np.ndarray, list_id: np.ndarray, gains: np.ndarray, k: int = NDCG_CUTOFF
) -> np.ndarray:
    """Returns NDCG@k of each list when its products are sorted by score.

    Args:
      scores: Score of each product, float [N]; equal ones keep the order they were shown in.
      list_id: Number of the list of each product, ascending, int [N].
      gains: Gain of each product, float [N].
      k: Number of positions that count.

    Returns:
      NDCG of each list that has a gain, float64 [at most the number of lists].
    """
    order = np.lexsort((-scores, list_id))  # stable
    lists = np.split(gains[order], np.flatnonzero(np.diff(list_id)) + 1)
    values = np.array([ndcg(one, k) for one in lists])
    return values[~np.isnan(values)]
