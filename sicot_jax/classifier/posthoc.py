"""Post-hoc adjustments for long-tailed classes: other class weights of a trained classifier.

Nothing is trained again. Every variant has other weights for the same embeddings, so that one pass
over the photos evaluates all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.parallel.array_types import Array, Float

# (class weights, log prior float32 [C]) -> class weights
Adjustment = Callable[[ClassWeights, Array], ClassWeights]


def adjust_logits(
    weights: ClassWeights, log_prior: Float[Array, " C"], *, tau: float
) -> ClassWeights:
    """Returns class weights whose logits are lowered by tau * log prior.

    Post-hoc logit adjustment (Menon et al. 2021, arXiv:2007.07314, eq. 9): tau 1 predicts as if
    classes were equally frequent. A negative tau returns the prior to a classifier that was trained
    with it inside its loss.

    Args:
      weights: kernel float32 [C, D], bias float32 [C].
      log_prior: log share of each class in the training photos, float32 [C].
      tau: strength of the adjustment.

    Returns:
      The same kernel with another bias.
    """
    return ClassWeights(weights.kernel, weights.bias - tau * log_prior)


def tau_normalize(
    weights: ClassWeights, log_prior: Float[Array, " C"], *, tau: float
) -> ClassWeights:
    """Returns rows w_c / |w_c|^tau without bias, since rows of frequent classes are the longest.

    Tau-normalisation (Kang et al. 2020, arXiv:1910.09217).

    Args:
      weights: kernel float32 [C, D], bias float32 [C].
      log_prior: not used.
      tau: strength of the normalisation.

    Returns:
      Another kernel, and a bias of zeros.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(weights.kernel), -1, keepdims=True))
    kernel = weights.kernel / jnp.maximum(norm, 1e-12) ** tau
    return ClassWeights(kernel, jnp.zeros_like(weights.bias))


# From the full prior returned to one and a half of it removed: the trade-off of head and tail.
ADJUSTMENTS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NORMALIZATIONS = (0.25, 0.5, 0.75, 1.0)

POSTHOC_VARIANTS: dict[str, Adjustment] = {
    **{f"logit_adjustment_{t:g}": functools.partial(adjust_logits, tau=t) for t in ADJUSTMENTS},
    **{f"tau_norm_{t:g}": functools.partial(tau_normalize, tau=t) for t in NORMALIZATIONS},
}
