"""The co-training loss, dense: the short reference that every faster head is tested against."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

STREAMS = ("visual", "mixed")


def cross_entropy(logits, label, *, smoothing: float = 0.0, num_classes: int | None = None):
    """-sum_c q_c log softmax(logits)_c per row, in float32: [B, C], int [B] -> [B].

    q = (1 - smoothing) on the label and smoothing / num_classes on every class (Szegedy et al.
    2016); classes beyond `num_classes` are padding.
    """
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(jnp.max(logits, -1))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), -1)) + highest
    # A masked sum, not an index: the gradient of an index would scatter, and nothing here is
    # sharded over classes.
    picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == label[:, None], logits, 0.0), -1)
    if not smoothing:
        return log_sum - picked
    num_classes = num_classes or logits.shape[-1]
    mean = (
        jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) < num_classes, logits, 0.0), -1)
        / num_classes
    )
    return log_sum - (1 - smoothing) * picked - smoothing * mean


def class_offset(bias, log_prior, tau: float, num_classes: int):
    """What is added to the products of one block of classes: bias + tau * log prior, padding at
    -inf.

    Adding tau * log(prior) during training is logit adjustment (Menon et al. 2021, eq. 10); tau = 1
    is balanced softmax.
    """
    if tau:
        bias = bias + tau * log_prior
    return jnp.where(jnp.arange(bias.shape[0]) < num_classes, bias, -jnp.inf)


def classifier_logits(embedding, kernel, offset, dtype=jnp.float32):
    """embedding @ kernel^T + offset, products in `dtype`, sums in float32: [B, D], [C, D], [C] ->
    [B, C].
    """
    products = jnp.einsum(
        "bd,cd->bc",
        embedding.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return products + offset


def co_training_loss(
    embeddings: Mapping[str, jax.Array],
    label,
    kernel,
    bias,
    *,
    weights: Mapping[str, float],
    log_prior=None,
    tau: float = 0.0,
    smoothing: float = 0.0,
    num_classes: int | None = None,
    dtype=jnp.float32,
):
    """L = sum over streams of w * mean CE(classifier(stream), y) (SICoT Eq. 1: visual and mixed,
    both with weight 1).

    Args:
      embeddings: stream -> [B, D].
      label: int32 [B].
      kernel: float32 [C, D], rows beyond `num_classes` are padding.
      bias: float32 [C].
      weights: stream -> w; only the streams named here count.
      log_prior, tau: logit adjustment, see `class_offset`.
      smoothing: share of the target that all classes have, see `cross_entropy`.
      dtype: of the product's inputs; sums, softmax and loss are float32.

    Returns: (loss, {stream: mean cross-entropy}).
    """
    if log_prior is None:
        log_prior = jnp.zeros_like(bias)
    num_classes = num_classes or kernel.shape[0]
    offset = class_offset(bias, log_prior, tau, num_classes)

    def loss(embedding):
        logits = classifier_logits(embedding, kernel, offset, dtype)
        return jnp.mean(cross_entropy(logits, label, smoothing=smoothing, num_classes=num_classes))

    losses = {stream: loss(embeddings[stream]) for stream in weights}
    return sum(weight * losses[stream] for stream, weight in weights.items()), losses


def word_loss(scores, token_ids):
    """How well photos tell the words of their titles: the multinomial loss of Joulin et al. 2016,
    over words by frequency.

    Mean over photos with such a word of -1 / |W_i| sum_{w in W_i} log softmax(z_i)_w, where score
    z_iw belongs to word w + 1 and W_i are the distinct words of title i that have a score.

    Args:
      scores: z, float32 [B, W].
      token_ids: int [B, T], 0 = padding; those above W have no score.

    Returns: float32 scalar, 0 for a batch without a title.
    """
    own = jnp.any(token_ids[:, :, None] == jnp.arange(1, scores.shape[1] + 1), 1)  # [B, W]
    number = jnp.sum(own, -1)
    told = jnp.sum(jnp.where(own, scores, 0.0), -1) / jnp.maximum(number, 1)
    losses = jax.nn.logsumexp(scores, -1) - told
    return jnp.sum(jnp.where(number > 0, losses, 0.0)) / jnp.maximum(jnp.sum(number > 0), 1)


def code_likeness(bits, unit, all_bits, all_unit):
    """Whether codes are as alike as the photos' embeddings: mean over pairs (i, j) of (s_i . s_j /
    b - 2 / pi arcsin c_ij)^2.

    s = sign(2 h - 1) is the code as the index has it, +-1, with the derivative of 2 h - 1 in place
    of the sign's (straight
    through: Bengio et al. 2013). c_ij is the cosine of embeddings i and j less their mean over the
      batch. The arcsine is what s_i . s_j / b is on average where the b directions are random
      (Charikar 2002): so directions learn to be better than random ones at what exact search would
      find, and need no classes, click or label for it. Matched to c itself they would crowd along
      the few directions of the largest variance.

    Args:
      bits: h, float32 [B, b]; unit: embeddings of length 1, [B, D]. The rows of one device.
      all_bits, all_unit: of the whole batch, [N, b] and [N, D]; on one device the same again.

    Returns: float32 scalar, the mean over B x N pairs.
    """
    centre = jnp.mean(all_unit, 0)
    # Nearer than 2.6 degrees all are as near: the arcsine makes 3e-4 of a rounding of 1e-7 at 1.
    cosine = jnp.clip(_unit(unit - centre) @ _unit(all_unit - centre).T, -0.999, 0.999)
    likeness = _rounded(bits) @ _rounded(all_bits).T / bits.shape[-1]
    return jnp.mean(jnp.square(likeness - jax.lax.stop_gradient(2 / jnp.pi * jnp.arcsin(cosine))))


def _rounded(bits):
    soft = 2 * bits - 1
    return soft + jax.lax.stop_gradient(jnp.where(bits > 0.5, 1.0, -1.0) - soft)


def _unit(rows):
    return rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(rows), -1, keepdims=True), 1e-12))


def code_balance(bits):
    """Whether each bit is on for half of the batch: mean over bits k of (2 mean_i h_ik - 1)^2; h
    float32 [B, b].
    """
    return jnp.mean(jnp.square(2 * jnp.mean(bits, 0) - 1))


def code_quantisation(bits):
    """Whether bits are decided: mean of 1 - (2 h - 1)^2, 1 at h = 1/2 and 0 at 0 or 1; h float32
    [B, b].
    """
    return jnp.mean(1 - jnp.square(2 * bits - 1))


def same_product(label, all_label):
    """Pairs of two photos of one product: labels int [B] -> bool [B, B], False for a photo with
    itself.
    """
    return (label[:, None] == all_label) & ~jnp.eye(len(label), dtype=bool)


def triplet_loss(unit, all_unit, label, all_label, *, margin: float):
    """Photos of one product are nearer to each other than to the hardest of another: mean of max(0,
    margin - s_ip + s_in).

    s are cosines; s_ip is the mean over the batch's other photos of photo i's product, n the most
    alike of those photos of other products that are less alike than that (semi-hard: Schroff et al.
    2015). What is more alike still is passed over: in a catalogue it is as a rule the same product
    under another number. The mean is over photos that have both.

    Args:
      unit: embeddings of length 1, float32 [B, D], divided over devices; all_unit: the same rows,
        whole on each.
      label, all_label: int [B], likewise.

    Returns: float32 scalar.
    """
    cosine = unit @ all_unit.T
    same = same_product(label, all_label)
    number = jnp.sum(same, 1)
    own = jnp.sum(jnp.where(same, cosine, 0.0), 1) / jnp.maximum(number, 1)
    told_apart = (label[:, None] != all_label) & (cosine < own[:, None])
    hardest = jnp.max(jnp.where(told_apart, cosine, -2.0), 1)
    counts = (number > 0) & jnp.any(told_apart, 1)
    losses = jnp.where(counts, jnp.maximum(margin - own + hardest, 0.0), 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1)


def told_outside(outside, all_inside, label, all_label, *, temperature: float = 0.1):
    """What is left outside of a photo's box must not tell its product: mean of max(0, t_i).

        t_i = log mean_{j of i's product} exp(s_ij / T) - log mean_{j != i} exp(s_ij / T),  s_ij =
        outside_i . inside_j

    A triplet loss over all triplets of the batch at once (Sohn 2016): to an eye that sees only what
    is outside, the product (clicked, or of the same label) is no nearer than the others (not
    clicked). Its gradient is for the boxes: `outside` moves them, the insides are taken as they
    are. The mean is over photos with another one of their product.

    Args, Returns: as `triplet_loss`; outside [B, D], all_inside [B, D] of length 1.
    """
    scores = outside @ jax.lax.stop_gradient(all_inside).T / temperature
    same, others = same_product(label, all_label), ~jnp.eye(len(label), dtype=bool)
    number = jnp.sum(same, 1)

    def log_mean(chosen, count):
        return jax.nn.logsumexp(jnp.where(chosen, scores, -1e9), 1) - jnp.log(jnp.maximum(count, 1))

    told = log_mean(same, number) - log_mean(others, len(label) - 1)
    return jnp.sum(jnp.where(number > 0, jnp.maximum(told, 0.0), 0.0)) / jnp.maximum(
        jnp.sum(number > 0), 1
    )


def box_distance(box, known):
    """Mean of |box - known| over photos whose box is known; [B, 4], all zero where it is not. 0 for
    a batch without one.
    """
    counts = jnp.any(known > 0, 1)
    distance = jnp.mean(jnp.abs(box - known), 1)
    return jnp.sum(jnp.where(counts, distance, 0.0)) / jnp.maximum(jnp.sum(counts), 1)


def log_prob_top_k(embedding, kernel, offset, label, k: int):
    """Dense reference of evaluation: (top-k classes [B, k], their logits [B, k], log-probability of
    the label [B]).
    """
    logits = classifier_logits(embedding, kernel, offset)
    values, classes = jax.lax.top_k(logits, k)
    return classes, values, -cross_entropy(logits, label)
