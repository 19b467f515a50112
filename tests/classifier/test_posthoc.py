"""Post-hoc adjustments by hand."""

import jax.numpy as jnp
import numpy as np

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.posthoc import POSTHOC_VARIANTS, adjust_logits, tau_normalize

KERNEL = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], np.float32)  # the last row is padding
WEIGHTS = ClassWeights(KERNEL, np.ones(3, np.float32))
LOG_PRIOR = jnp.log(jnp.array([0.5, 0.125, 1.0]))


def test_logit_adjustment_by_hand():
    """Priors 1/2 and 1/8: removing them adds log 2 and log 8."""
    adjusted = adjust_logits(WEIGHTS, LOG_PRIOR, tau=1.0)
    assert adjusted.kernel is KERNEL
    np.testing.assert_allclose(adjusted.bias, [1 + np.log(2), 1 + np.log(8), 1], rtol=1e-6)


def test_tau_normalisation_by_hand():
    """Rows of length 5 and 1; a padding row stays zero."""
    half = tau_normalize(WEIGHTS, LOG_PRIOR, tau=0.5)
    np.testing.assert_allclose(half.kernel, KERNEL / np.sqrt([[5.0], [1.0], [1.0]]), rtol=1e-6)
    assert not half.bias.any()
    full = tau_normalize(WEIGHTS, LOG_PRIOR, tau=1.0)
    np.testing.assert_allclose(full.kernel[0], [0.6, 0.8], rtol=1e-6)


def test_every_variant_returns_class_weights():
    for adjust in POSTHOC_VARIANTS.values():
        adjusted = adjust(WEIGHTS, LOG_PRIOR)
        assert (adjusted.kernel.shape, adjusted.bias.shape) == ((3, 2), (3,))
