"""Long-tail remedies on a finished classifier: nothing is trained again.

Each variant is another (kernel, bias) for the same embeddings, so that one pass over the photos
tests all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sicot_jax.classifier.heads import Classifier

Changed = Callable[
    [Classifier], tuple[jax.Array, jax.Array]
]  # -> (kernel [C padded, D], bias [C padded])


def adjusted(classifier: Classifier, tau: float):
    """Logits - tau * log prior (Menon et al. 2021, eq. 9): tau 1 predicts as if classes were
    equally frequent.

    Below 0 it goes the other way: a classifier trained with the prior inside its loss gets it back.
    """
    return classifier.kernel, classifier.bias - tau * classifier.log_prior


def normalised(classifier: Classifier, tau: float):
    """Rows w_c / |w_c|^tau and no bias (Kang et al. 2020, tau-normalisation): the head's rows are
    the longest.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(classifier.kernel), -1, keepdims=True))
    return classifier.kernel / jnp.maximum(norm, 1e-12) ** tau, jnp.zeros_like(classifier.bias)


# From the prior given back whole to one and a half of it taken away: the trade-off between head and
# tail.
ADJUSTMENTS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NORMALISATIONS = (0.25, 0.5, 0.75, 1.0)

VARIANTS: dict[str, Changed] = {
    **{f"logit_adjustment_{tau:g}": functools.partial(adjusted, tau=tau) for tau in ADJUSTMENTS},
    **{f"tau_norm_{tau:g}": functools.partial(normalised, tau=tau) for tau in NORMALISATIONS},
}
