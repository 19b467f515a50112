"""Predicts a photo's category: classifier posterior fused with a vote of the nearest photos.

    p_c = a_c m_c + (1 - a_c) s_c, normalised over the categories
    m_c = sum of the classifier's probabilities of the products of category c, normalised
    s_c = sum_i w_i [c_i = c] / sum_i w_i,  w_i = exp((cos_i - cos_1) / T),
          over the `NUM_NEIGHBOURS` nearest photos of the index

Product probabilities are then rescaled by (p_c / m_c)^b. Both branches and the vote of 30 follow
Pailitao (Zhang et al. 2018, arXiv:2102.04674), whose classifier branch is a separate network; here
it is the product classifier itself, whose sum is more accurate than a category head fitted to the
embeddings (docs/results/ranking.md). a_c, b and T are fitted to photos that neither classifier nor
index have seen (`fit_category_fusion`).

Categories are integers from 0 to num_categories - 1; num_categories itself means "no category".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.common.json_types import check_field_types
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError

FORMAT = 2
NUM_NEIGHBOURS = 30
MIN_PROBABILITY = 1e-6  # floor under logarithms, so that one impossible photo decides no fit


def sum_by_category(values: np.ndarray, category: np.ndarray, num_categories: int) -> np.ndarray:
    """Returns the sum of values per category.

    Args:
      values: One value per product or photo, float [N].
      category: Category of each, int [N]; num_categories where it has none.
      num_categories: Number of categories, K.

    Returns:
      Sums, float64 [K]; entries without a category are left out.
    """
    sums = np.bincount(category, weights=values, minlength=num_categories + 1)
    return sums[:num_categories].astype(np.float64)  # bincount of nothing gives integers


def neighbour_vote(
    similarity: np.ndarray, category: np.ndarray, num_categories: int, temperature: float
) -> np.ndarray:
    """Returns the similarity-weighted vote of the nearest photos over categories.

    Args:
      similarity: Cosines of the nearest photos, float [B, N].
      category: Category of each photo, int [B, N]; num_categories where it has none.
      num_categories: Number of categories, K.
      temperature: T; a greater one gives more equal weights.

    Returns:
      Votes that sum to 1, float64 [B, K]; zeros where no photo has a category.
    """
    has_category = category < num_categories
    nearest = np.max(np.where(has_category, similarity, -np.inf), 1, keepdims=True, initial=-1.0)
    weights = np.exp((similarity - nearest) / temperature) * has_category
    votes = [
        sum_by_category(row, row_category, num_categories)
        for row, row_category in zip(weights, category, strict=True)
    ]
    return normalize_rows(np.reshape(votes, (len(similarity), num_categories)))


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Divides each row by its sum; rows of zeros stay zero.

    Args:
      rows: Non-negative values, float64 [..., K].

    Returns:
      Float64 [..., K], each row sums to 1 or is zero.
    """
    total = rows.sum(-1, keepdims=True)
    return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class CategoryFusion:
    """Fitted weights that fuse the classifier's category posterior with the neighbour vote.

    Attributes:
      names: Names of the categories, K of them.
      classifier_weights: a, the weight of the classifier for each category, float64 [K].
      default_weight: a of a category that the fit has not seen.
      temperature: T of the neighbour vote.
      rescaling_exponent: b, the exponent with which product probabilities follow the category.
      confident_from: Least probability at which `CONFIDENT_PRECISION` of the photos
        have the predicted category, given that their nearest photo agrees; None where no
        probability is enough.
      num_photos: Number of photos in the fit.
    """

    names: tuple[str, ...]
    classifier_weights: np.ndarray
    default_weight: float
    temperature: float
    rescaling_exponent: float
    confident_from: float | None
    num_photos: int

    def for_categories(self, names: tuple[str, ...]) -> CategoryFusion:
        """Returns the fusion for other categories; new ones get the default weight.

        Args:
          names: Names of the categories, in the order of the arrays to fuse.

        Returns:
          The fusion, `self` where the names are the same.
        """
        if names == self.names:
            return self
        known = dict(zip(self.names, self.classifier_weights.tolist(), strict=True))
        weights = np.array([known.get(name, self.default_weight) for name in names])
        return dataclasses.replace(self, names=names, classifier_weights=weights)

    def __call__(self, category_mass: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Returns the fused category posterior.

        Args:
          category_mass: Sums of product probabilities per category, float64 [B, K]; they need
            not sum to 1, since products may have no category.
          votes: Neighbour votes, float64 [B, K].

        Returns:
          Posterior p, float64 [B, K]. Where one branch is all zeros the other decides; zeros
          where both are.
        """
        weights = self.classifier_weights
        return normalize_rows(weights * normalize_rows(category_mass) + (1 - weights) * votes)

    def log_factors(self, category_mass: np.ndarray, posterior: np.ndarray) -> np.ndarray:
        """Returns what is added to the logits of each category's products, b log(p / m).

        Args:
          category_mass: Sums of product probabilities per category, float64 [B, K].
          posterior: Fused posterior p, float64 [B, K].

        Returns:
          Float64 [B, K]; zeros for a photo of which `category_mass` or `posterior` is all zeros.
        """
        return self.rescaling_exponent * _log_ratio(category_mass, posterior)


def _log_ratio(category_mass: np.ndarray, posterior: np.ndarray) -> np.ndarray:
    classifier = np.maximum(normalize_rows(category_mass), MIN_PROBABILITY)
    ratio = np.log(np.maximum(posterior, MIN_PROBABILITY)) - np.log(classifier)
    defined = category_mass.any(-1, keepdims=True) & posterior.any(-1, keepdims=True)
    return ratio * defined


def write_fusion(path: Path, fusion: CategoryFusion) -> None:
    """Writes a category fusion as JSON, atomically.

    Args:
      path: File to write.
      fusion: The fusion.
    """
    stored = {field.name: getattr(fusion, field.name) for field in dataclasses.fields(fusion)}
    weights = fusion.classifier_weights.tolist()
    write_json(path, stored | {"classifier_weights": weights, "format": FORMAT})


def read_fusion(path: Path) -> CategoryFusion | None:
    """Reads a category fusion.

    Args:
      path: File that `write_fusion` wrote.

    Returns:
      The fusion, or None without a file (the index was built from too few validation photos).

    Raises:
      InputError: The file is of another format, or damaged.
    """
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path, "the categories of an index")
    if stored.pop("format", None) != FORMAT:
        raise InputError(
            f"{path}: of another format, this version reads {FORMAT}; build the index again"
        )
    try:
        check_field_types(CategoryFusion, stored)
        weights = np.array(stored["classifier_weights"], float)
        if weights.shape != (len(stored["names"]),):
            raise ValueError(f"weights {weights.shape} of {len(stored['names'])} categories")
        return CategoryFusion(
            **stored | {"names": tuple(stored["names"]), "classifier_weights": weights}
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged or incomplete ({one_line_error(error)}); build the index again"
        ) from error


CONFIDENT_PRECISION = 0.99  # share of confident photos whose predicted category must be right
MIN_SUPPORT = 0.05  # least share of the photos that must be confident
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
EXPONENTS = np.linspace(0, 1, 11)  # candidates of b
# Strengths r of the penalty that pulls a category's weight towards the shared one, strongest first;
# under the first the two are equal.
PENALTIES = (1e12, 300.0, 30.0, 3.0)
_WEIGHTS = np.linspace(0, 1, 21)  # candidates of a
_NUM_FOLDS = 10
_TOLERANCE = 1e-9  # means that differ by less are equal


@dataclasses.dataclass(frozen=True, eq=False)
class CategoryFitData:
    """Labelled photos that a category fusion is fitted to.

    Attributes:
      category_mass: Sums of product probabilities per category, float64 [B, K].
      similarity: Cosines of the nearest photos, float [B, N].
      neighbour_category: Categories of the nearest photos, int [B, N]; K for none.
      category: Category of each photo, int [B].
      product: Product of each photo, int [B]; photos of a product are not independent.
      names: Names of the K categories.
    """

    category_mass: np.ndarray
    similarity: np.ndarray
    neighbour_category: np.ndarray
    category: np.ndarray
    product: np.ndarray
    names: Sequence[str]

    def votes(self, temperature: float) -> np.ndarray:
        """Returns the neighbour vote of each photo.

        Args:
          temperature: T of the vote.

        Returns:
          Votes, float64 [B, K].
        """
        return neighbour_vote(
            self.similarity, self.neighbour_category, len(self.names), temperature
        )


def fit_category_fusion(data: CategoryFitData) -> CategoryFusion:
    """Fits temperature, weights and confidence threshold of a category fusion.

    1. T and one shared weight a maximise the mean log p of the right category. A single branch is
       kept where it is as good by the one-standard-error rule on reciprocal ranks: by likelihood
       any mixture would improve an overconfident branch.
    2. Each category gets a weight: the one that maximises the log likelihood of "is c" and
       "is not c" under a_c m_c + (1 - a_c) s_c, less r (a_c - a)^2. r is the strongest penalty of
       `PENALTIES` that is as good in ten-fold cross-validation over products.
    3. b is left at 1; `fit_rescaling_exponent` fits it.

    Args:
      data: Labelled photos.

    Returns:
      The fusion. Without photos: a = 1/2, T = 0.05, never confident.
    """
    count = len(data.category)
    if not count:
        weights = np.full(len(data.names), 0.5)
        return CategoryFusion(tuple(data.names), weights, 0.5, 0.05, 1.0, None, 0)
    classifier = normalize_rows(data.category_mass)
    temperature, shared_weight = _fit_shared(data, classifier)
    vote = data.votes(temperature)
    weights = _fit_weights_per_category(data, classifier, vote, shared_weight)
    fusion = CategoryFusion(
        tuple(data.names), weights, shared_weight, temperature, 1.0, None, count
    )
    posterior = fusion(data.category_mass, vote)
    predicted = posterior.argmax(1)
    nearest = data.neighbour_category[np.arange(count), data.similarity.argmax(1)]
    agrees = nearest == predicted
    confident_from = _confidence_threshold(
        posterior.max(1)[agrees], (predicted == data.category)[agrees], MIN_SUPPORT * count
    )
    return dataclasses.replace(fusion, confident_from=confident_from)


def _fit_shared(data: CategoryFitData, classifier: np.ndarray) -> tuple[float, float]:
    """Returns T and the weight a that all categories share."""
    photos = np.arange(len(data.category))
    votes = {temperature: data.votes(temperature) for temperature in TEMPERATURES}

    def posterior(pair: tuple[float, float]) -> np.ndarray:
        temperature, weight = pair
        return weight * classifier + (1 - weight) * votes[temperature]

    def log_likelihood(pair: tuple[float, float]) -> float:
        right = posterior(pair)[photos, data.category]
        return float(np.log(np.maximum(right, MIN_PROBABILITY)).mean())

    # Of equally good pairs the first counts: where the classifier alone decides, T is then the best
    # one for the vote alone.
    by_vote = sorted(TEMPERATURES, key=lambda temperature: -log_likelihood((temperature, 0.0)))
    pairs = [(temperature, float(weight)) for temperature in by_vote for weight in _WEIGHTS]
    single_branch = [pair for pair in pairs if pair[1] in (0, 1)]
    choices = [max(candidates, key=log_likelihood) for candidates in (single_branch, pairs)]
    ranks = np.stack([_reciprocal_ranks(posterior(pair), data.category) for pair in choices])
    return choices[one_standard_error_choice(ranks, data.product)]


def _fit_weights_per_category(
    data: CategoryFitData, classifier: np.ndarray, vote: np.ndarray, shared_weight: float
) -> np.ndarray:
    folds = _product_folds(data.product)
    likelihoods = _fold_likelihoods(classifier, vote, data.category, folds)
    held_out_ranks = np.zeros((len(PENALTIES), len(data.category)))
    for fold, photos in enumerate(folds):
        for ranks, penalty in zip(held_out_ranks, PENALTIES, strict=True):
            training = likelihoods.sum(0) - likelihoods[fold]
            weights = _penalized_weights(training, shared_weight, penalty)
            posterior = normalize_rows(weights * classifier[photos] + (1 - weights) * vote[photos])
            ranks[photos] = _reciprocal_ranks(posterior, data.category[photos])
    penalty = PENALTIES[one_standard_error_choice(held_out_ranks, data.product)]
    return _penalized_weights(likelihoods.sum(0), shared_weight, penalty)


def _reciprocal_ranks(probability: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Returns 1 / rank of the right category, [B, K] -> [B]; ties share the mean rank."""
    right = probability[np.arange(len(category)), category][:, None]
    return 2 / (1 + (probability > right).sum(1) + (probability >= right).sum(1))


def _fold_likelihoods(
    classifier: np.ndarray, vote: np.ndarray, category: np.ndarray, folds: list[np.ndarray]
) -> np.ndarray:
    """Returns log likelihoods of "is c" and "is not c", float64 [folds, weights, K]."""
    num_categories = classifier.shape[1]
    is_category = np.arange(num_categories) == category[:, None]
    sums = np.empty((len(folds), len(_WEIGHTS), num_categories))
    for number, weight in enumerate(_WEIGHTS):
        mixture = weight * classifier + (1 - weight) * vote
        mixture = np.clip(mixture, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        log_likelihood = np.log(np.where(is_category, mixture, 1 - mixture))
        for fold, photos in enumerate(folds):
            sums[fold, number] = log_likelihood[photos].sum(0)
    return sums


def _penalized_weights(likelihood: np.ndarray, shared_weight: float, penalty: float) -> np.ndarray:
    """Returns the best weight per category, from likelihoods [weights, K] -> [K]."""
    penalties = penalty * (_WEIGHTS[:, None] - shared_weight) ** 2
    return _WEIGHTS[(likelihood - penalties).argmax(0)]


def _product_folds(products: np.ndarray) -> list[np.ndarray]:
    """Returns the photos of each fold; products are assigned at random, with a fixed seed."""
    unique, index = np.unique(products, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(len(unique)) % _NUM_FOLDS)[index]
    return [np.flatnonzero(fold == number) for number in range(_NUM_FOLDS)]


def one_standard_error_choice(values: np.ndarray, products: np.ndarray) -> int:
    """Returns the simplest choice whose mean is within one standard error of the best mean.

    The error is that of paired differences, with the photos of a product as one cluster:
    sqrt(sum over products of (sum of deviations)^2) / B. Rule: Breiman et al. 1984,
    "Classification and Regression Trees", section 3.4.3.

    Args:
      values: A value per choice and photo, greater is better, float [choices, B]; simplest
        choice first.
      products: Product of each photo, int [B].

    Returns:
      Index of the choice.
    """
    deficit = values[values.mean(1).argmax()] - values
    mean = deficit.mean(1)
    cluster = np.unique(products, return_inverse=True)[1]
    sums = [np.bincount(cluster, weights=row) for row in deficit - mean[:, None]]
    error = np.sqrt([np.sum(row**2) for row in sums]) / values.shape[1]
    return int(np.flatnonzero(mean <= error + _TOLERANCE)[0])


def fit_rescaling_exponent(reciprocal_ranks: np.ndarray, products: np.ndarray) -> float:
    """Returns b, the smallest exponent that is as good by the one-standard-error rule.

    Ranks decide, not likelihoods: an overconfident classifier gains likelihood by any flattening.

    Args:
      reciprocal_ranks: 1 / rank of the right product at each of `EXPONENTS`, float [11, B].
      products: Product of each photo, int [B].

    Returns:
      The exponent; 0 without photos.
    """
    if not reciprocal_ranks.shape[1]:
        return 0.0
    return float(EXPONENTS[one_standard_error_choice(reciprocal_ranks, products)])


def _confidence_threshold(
    probability: np.ndarray, correct: np.ndarray, min_photos: float
) -> float | None:
    """Returns the least probability above which enough predictions are right, or None."""
    order = np.argsort(-probability, kind="stable")
    counts = np.arange(1, len(order) + 1)
    precision = np.cumsum(correct[order]) / counts
    # Equal probabilities are confident together: only the last of each group is a threshold.
    last = np.append(np.diff(probability[order]) != 0, True)
    enough = np.flatnonzero((precision >= CONFIDENT_PRECISION) & last & (counts >= min_photos))
    return float(probability[order[enough[-1]]]) if len(enough) else None
