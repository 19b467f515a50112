"""Fits the category fusion (`category.CategoryFusion`) to labelled photos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sicot_jax.search.category import (
    MIN_PROBABILITY,
    CategoryFusion,
    neighbour_vote,
    normalize_rows,
)

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
