"""The trust ratio of LARS for a kernel that is updated some rows at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sicot_jax.config import OptimConfig
from sicot_jax.parallel.array_types import Array, Float


@dataclasses.dataclass(frozen=True)
class TrustRatio:
    """LARS's trust ratio of a kernel, accumulated over chunks of its rows.

    ratio = coefficient * |W| / |G + weight_decay * W|, norms over the complete kernel, 1 where one
    of them is 0: what `optax.scale_by_trust_ratio` computes of a kernel in one piece. You, Gitman &
    Ginsburg 2017, arXiv:1708.03888.

    Attributes:
      coefficient: factor of the ratio.
      weight_decay: factor of W in the denominator.
    """

    coefficient: float
    weight_decay: float

    def squared_norms(
        self, gradient: Float[Array, "n D"], kernel: Float[Array, "n D"]
    ) -> Float[Array, " 2"]:
        """Returns what some rows contribute to the two squared norms, to be summed over rows.

        Args:
          gradient: G of the rows, float32 [n, D].
          kernel: W of the rows, float32 [n, D].

        Returns:
          Sums of squares of W and of G + weight_decay * W, float32 [2].
        """
        update = gradient + self.weight_decay * kernel
        return jnp.stack([jnp.sum(jnp.square(kernel)), jnp.sum(jnp.square(update))])

    def from_squared_norms(self, squared_norms: Float[Array, " 2"]) -> Float[Array, ""]:
        """Returns the ratio.

        Args:
          squared_norms: `squared_norms` summed over all rows, float32 [2].

        Returns:
          float32 scalar.
        """
        kernel, update = jnp.sqrt(squared_norms)
        return jnp.where((kernel == 0) | (update == 0), 1.0, self.coefficient * kernel / update)


def make_trust_ratio(config: OptimConfig) -> TrustRatio | None:
    """Returns the trust ratio that an optimizer needs of the classifier's kernel.

    Args:
      config: the optimizer.

    Returns:
      The trust ratio; None for optimizers without one, and for a frozen kernel.
    """
    if config.name != "lars" or not config.trains("classifier/kernel"):
        return None
    return TrustRatio(config.trust_coefficient, config.weight_decay)


def scale_by_trust_ratio(coefficient: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.scale_by_trust_ratio` that can be given the ratio.

    Args:
      coefficient: factor of the ratio.

    Returns:
      A transformation; with the extra argument `trust_ratio`, a float32 scalar, it scales by that
      ratio instead of the one of the arrays at hand, which may be some rows of a kernel.
    """
    complete = optax.scale_by_trust_ratio(trust_coefficient=coefficient)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        trust_ratio: Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if trust_ratio is None:
            return complete.update(updates, state, params)
        return jax.tree.map(lambda x: x * trust_ratio, updates), state

    return optax.GradientTransformationExtraArgs(complete.init, update)
