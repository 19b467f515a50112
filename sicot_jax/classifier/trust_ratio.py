"""LARS for a kernel that is updated some rows at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sicot_jax.config import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrustRatio:
    """LARS's trust ratio of a kernel that is met some rows at a time (You, Gitman & Ginsburg 2017).

    ratio = coefficient * |W| / |G + weight_decay * W|, norms over the whole kernel, 1 where one of
    them is 0: what `optax.scale_by_trust_ratio` computes of a kernel in one piece.
    """

    coefficient: float
    weight_decay: float

    def squares(self, gradient, kernel):
        """float32 [2]: the sums of squares of W and of G + weight_decay * W, of some rows [n, D];
        to be added up.
        """
        update = gradient + self.weight_decay * kernel
        return jnp.stack([jnp.sum(jnp.square(kernel)), jnp.sum(jnp.square(update))])

    def of(self, squares):
        """The ratio, a scalar, from the `squares` of all rows."""
        kernel, update = jnp.sqrt(squares)
        return jnp.where((kernel == 0) | (update == 0), 1.0, self.coefficient * kernel / update)


def make_trust_ratio(config: OptimConfig) -> TrustRatio | None:
    """What a head that updates the kernel some rows at a time has to find out about all of it
    first; None for nothing.
    """
    if config.name != "lars" or not config.trains("classifier/kernel"):
        return None
    return TrustRatio(config.trust_coefficient, config.weight_decay)


def scale_by_trust_ratio(coefficient: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_trust_ratio`, or by the `trust_ratio` that the update is given: for some rows
    of a kernel.
    """
    whole = optax.scale_by_trust_ratio(trust_coefficient=coefficient)

    def update(updates, state, params=None, *, trust_ratio=None, **extra_args):
        if trust_ratio is None:
            return whole.update(updates, state, params)
        return jax.tree.map(lambda x: x * trust_ratio, updates), state

    return optax.GradientTransformationExtraArgs(whole.init, update)
