"""The co-training loss, dense: the short reference that every faster head is tested against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.parallel.array_types import Array, Float, Int

STREAMS = ("visual", "mixed")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of the co-training loss that are fixed when a step is compiled.

    Attributes:
      num_classes: C; rows beyond it are padding: no probability, no gradient.
      tau: strength of the logit adjustment, see `logit_offsets`.
      smoothing: share of the target that all classes have, see `cross_entropy`.
      dtype: dtype of the inputs of the products; sums, softmax and loss are float32.
    """

    num_classes: int
    tau: float = 0.0
    smoothing: float = 0.0
    dtype: DTypeLike = jnp.float32


def cross_entropy(
    logits: Float[Array, "B C"],
    label: Int[Array, " B"],
    *,
    smoothing: float = 0.0,
    num_classes: int | None = None,
) -> Float[Array, " B"]:
    """Returns the cross-entropy of each row, -sum_c q_c log softmax(logits)_c.

    q = (1 - smoothing) on the label and smoothing / num_classes on every class (Szegedy et al.
    2016, arXiv:1512.00567).

    Args:
      logits: float [B, C].
      label: class ids, int [B].
      smoothing: share of the target that all classes have.
      num_classes: classes from here on are padding; None for all of C.

    Returns:
      float32 [B].

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[1.0, 1.0, 2.0]]))
      >>> [round(float(x), 4) for x in cross_entropy(logits, jnp.array([2]))]  # log 2
      [0.6931]
    """
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(jnp.max(logits, -1))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), -1)) + highest
    # A masked sum, not an index: the gradient of an index would scatter, and nothing here is
    # sharded over classes.
    label_logit = jnp.sum(
        jnp.where(jnp.arange(logits.shape[-1]) == label[:, None], logits, 0.0), -1
    )
    if not smoothing:
        return log_sum - label_logit
    num_classes = num_classes or logits.shape[-1]
    mean = (
        jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) < num_classes, logits, 0.0), -1)
        / num_classes
    )
    return log_sum - (1 - smoothing) * label_logit - smoothing * mean


def logit_offsets(
    bias: Float[Array, " C"], log_prior: Float[Array, " C"] | None, tau: float, num_classes: int
) -> Float[Array, " C"]:
    """Returns what is added to the products of embeddings and rows: bias + tau * log prior.

    Adding tau * log(prior) during training is logit adjustment (Menon et al. 2021,
    arXiv:2007.07314, eq. 10); tau = 1 is balanced softmax.

    Args:
      bias: float32 [C].
      log_prior: log share of each class in the training photos, float32 [C]; not read at tau 0.
      tau: strength of the adjustment.
      num_classes: classes from here on are padding.

    Returns:
      float32 [C], -inf for padding.
    """
    if tau:
        assert log_prior is not None
        bias = bias + tau * log_prior
    return jnp.where(jnp.arange(bias.shape[0]) < num_classes, bias, -jnp.inf)


def class_logits(
    embedding: Float[Array, "B D"],
    kernel: Float[Array, "C D"],
    offsets: Float[Array, " C"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B C"]:
    """Returns embedding @ kernel^T + offsets.

    Args:
      embedding: float [B, D].
      kernel: float32 [C, D].
      offsets: float32 [C].
      dtype: dtype of the inputs of the product; sums are float32.

    Returns:
      float32 [B, C].
    """
    products = jnp.einsum(
        "bd,cd->bc",
        embedding.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return products + offsets


def co_training_loss(
    embeddings: Mapping[str, Array],
    label: Int[Array, " B"],
    weights: ClassWeights,
    *,
    stream_weights: Mapping[str, ArrayLike],
    log_prior: Float[Array, " C"] | None = None,
    options: LossOptions | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the sum over streams of weight * mean cross-entropy (SICoT, eq. 1).

    Equation 1 has the visual and the mixed stream, both with weight 1.

    Args:
      embeddings: stream -> float [B, D].
      label: class ids, int32 [B].
      weights: kernel float32 [C, D], bias float32 [C].
      stream_weights: stream -> weight; only the streams named here count.
      log_prior: log share of each class in the training photos, float32 [C]; None for zeros.
      options: static options; None for plain cross-entropy over all rows.

    Returns:
      The loss, float32 scalar; stream -> mean cross-entropy, float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = ClassWeights(jnp.zeros((4, 3)), jnp.zeros(4))
      >>> embeddings = {"visual": jnp.ones((2, 3)), "mixed": jnp.ones((2, 3))}
      >>> loss, streams = co_training_loss(
      ...     embeddings, jnp.array([0, 1]), weights, stream_weights={"visual": 1.0, "mixed": 1.0}
      ... )
      >>> round(float(loss), 4), round(float(streams["mixed"]), 4)  # 2 log 4, log 4
      (2.7726, 1.3863)
    """
    if log_prior is None:
        log_prior = jnp.zeros_like(weights.bias)
    options = options or LossOptions(weights.kernel.shape[0])
    num_classes, smoothing = options.num_classes, options.smoothing
    offsets = logit_offsets(weights.bias, log_prior, options.tau, num_classes)

    def loss(embedding: Array) -> Array:
        logits = class_logits(embedding, weights.kernel, offsets, options.dtype)
        return jnp.mean(cross_entropy(logits, label, smoothing=smoothing, num_classes=num_classes))

    losses = {stream: loss(embeddings[stream]) for stream in stream_weights}
    total: Any = sum(weight * losses[stream] for stream, weight in stream_weights.items())
    return total, losses


def dense_log_prob_top_k(
    embedding: Float[Array, "B D"],
    kernel: Float[Array, "C D"],
    offsets: Float[Array, " C"],
    label: Int[Array, " B"],
    k: int,
) -> tuple[Int[Array, "B {k}"], Float[Array, "B {k}"], Float[Array, " B"]]:
    """Returns the k best classes, densely: the reference of `top_k.log_prob_top_k`.

    Args:
      embedding: float [B, D].
      kernel: float32 [C, D].
      offsets: float32 [C], see `logit_offsets`.
      label: class ids, int32 [B].
      k: number of classes.

    Returns:
      Class ids int32 [B, k] and their logits float32 [B, k], best first; log-probability of the
      label, float32 [B].
    """
    logits = class_logits(embedding, kernel, offsets)
    values, classes = jax.lax.top_k(logits, k)
    return classes, values, -cross_entropy(logits, label)
