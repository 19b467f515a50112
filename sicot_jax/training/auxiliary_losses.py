"""Loss terms besides the classifier's cross-entropy, as pure functions of arrays.

Tag prediction, binary codes, triplets of photos, and the localisation branch. `training.losses`
adds them to a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sicot_jax.config import LossConfig
from sicot_jax.models.localization import box_area
from sicot_jax.models.sicot import SicotOutputs, unit_rows
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Bool, Float, Int


def tag_prediction_loss(
    tag_logits: Float[Array, "B V"], token_ids: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the multinomial loss of predicting the words of titles from photos.

    Mean over photos with such a word of -1 / |W_i| sum_{w in W_i} log softmax(z_i)_w, where logit
    z_iw belongs to word w + 1 and W_i are the distinct words of title i within the tag vocabulary
    (Joulin et al. 2016, arXiv:1511.02251).

    Args:
      tag_logits: z, float32 [B, V].
      token_ids: int [B, T], 0 = padding; ids above V are no tags.

    Returns:
      float32 scalar, 0 for a batch without a tag.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = tag_prediction_loss(jnp.zeros((1, 4)), jnp.array([[2, 3, 0]]))
      >>> round(float(loss), 4)  # log 4
      1.3863
    """
    is_tag = jnp.any(token_ids[:, :, None] == jnp.arange(1, tag_logits.shape[1] + 1), 1)  # [B, V]
    count = jnp.sum(is_tag, -1)
    mean_logit = jnp.sum(jnp.where(is_tag, tag_logits, 0.0), -1) / jnp.maximum(count, 1)
    losses = jax.nn.logsumexp(tag_logits, -1) - mean_logit
    return jnp.sum(jnp.where(count > 0, losses, 0.0)) / jnp.maximum(jnp.sum(count > 0), 1)


def code_similarity_loss(
    code: Float[Array, "B bits"],
    unit: Float[Array, "B D"],
    all_codes: Float[Array, "N bits"],
    all_units: Float[Array, "N D"],
) -> Float[Array, ""]:
    """Returns how far similarities of binary codes are from those of the embeddings.

    Mean over pairs (i, j) of (s_i . s_j / b - 2 / pi arcsin c_ij)^2. s = sign(2 h - 1) is the code
    as the index has it, +-1, with the derivative of 2 h - 1 in place of the sign's
    (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). c_ij is the cosine of
    embeddings i and j less their mean over the batch. The arcsine is the mean of s_i . s_j / b for
    b random directions (Charikar 2002): the directions learn to be better than random ones at what
    exact search would return, and need no class, click or label for it. Matched to c itself they
    would crowd along the few directions of largest variance.

    Args:
      code: bit probabilities h of one device's photos, float32 [B, b].
      unit: their embeddings, of length 1, float32 [B, D].
      all_codes: bit probabilities of the batch, float32 [N, b]; `code` on a single device.
      all_units: embeddings of the batch, float32 [N, D].

    Returns:
      float32 scalar, the mean over B x N pairs.
    """
    center = jnp.mean(all_units, 0)
    # Clipped at 2.6 degrees: the derivative of the arcsine makes 3e-4 of a rounding of 1e-7 at 1.
    cosine = jnp.clip(unit_rows(unit - center) @ unit_rows(all_units - center).T, -0.999, 0.999)
    similarity = _signs(code) @ _signs(all_codes).T / code.shape[-1]
    target = jax.lax.stop_gradient(2 / jnp.pi * jnp.arcsin(cosine))
    return jnp.mean(jnp.square(similarity - target))


def _signs(code: Array) -> Array:
    # +-1 with the gradient of 2 h - 1.
    soft = 2 * code - 1
    return soft + jax.lax.stop_gradient(jnp.where(code > 0.5, 1.0, -1.0) - soft)


def code_balance_loss(code: Float[Array, "B bits"]) -> Float[Array, ""]:
    """Returns how far bits are from being on for half of the batch.

    Args:
      code: bit probabilities h, float32 [B, b].

    Returns:
      mean over bits k of (2 mean_i h_ik - 1)^2, float32 scalar within [0, 1].
    """
    return jnp.mean(jnp.square(2 * jnp.mean(code, 0) - 1))


def code_quantisation_loss(code: Float[Array, "B bits"]) -> Float[Array, ""]:
    """Returns how far bits are from being decided.

    Args:
      code: bit probabilities h, float32 [B, b].

    Returns:
      mean of 1 - (2 h - 1)^2, float32 scalar: 1 at h = 1/2 and 0 at h = 0 or 1.
    """
    return jnp.mean(1 - jnp.square(2 * code - 1))


def triplet_loss(
    unit: Float[Array, "B D"],
    all_units: Float[Array, "N D"],
    label: Int[Array, " B"],
    all_labels: Int[Array, " N"],
    *,
    margin: float,
) -> Float[Array, ""]:
    """Returns the semi-hard triplet loss: mean of max(0, margin - s_ip + s_in).

    s are cosines; s_ip is the mean over the batch's other photos of photo i's product, n the most
    similar of those photos of other products that are less similar than that (semi-hard negatives:
    Schroff et al. 2015, arXiv:1503.03832). Photos of another product that are more similar still
    are
    left out: in a catalogue they are as a rule the same product under another number. The mean is
    over photos that have both.

    Args:
      unit: embeddings of length 1, float32 [B, D], divided over devices.
      all_units: the same rows on every device, float32 [B, D].
      label: class ids, int [B], divided over devices.
      all_labels: the same on every device, int [B].
      margin: wanted difference of the two cosines.

    Returns:
      float32 scalar, 0 for a batch without a triplet.

    Example:
      >>> import jax.numpy as jnp
      >>> unit = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
      >>> label = jnp.array([0, 0, 1])
      >>> round(float(triplet_loss(unit, unit, label, label, margin=0.5)), 4)
      0.3
    """
    cosine = unit @ all_units.T
    positive = _positive_pairs(label, all_labels)
    count = jnp.sum(positive, 1)
    mean_positive = jnp.sum(jnp.where(positive, cosine, 0.0), 1) / jnp.maximum(count, 1)
    negative = (label[:, None] != all_labels) & (cosine < mean_positive[:, None])
    hardest = jnp.max(jnp.where(negative, cosine, -2.0), 1)
    counts = (count > 0) & jnp.any(negative, 1)
    losses = jnp.where(counts, jnp.maximum(margin - mean_positive + hardest, 0.0), 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1)


def background_suppression_loss(
    background: Float[Array, "B D"],
    all_foregrounds: Float[Array, "N D"],
    label: Int[Array, " B"],
    all_labels: Int[Array, " N"],
    *,
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """Returns a penalty on backgrounds that still identify the product: mean of max(0, t_i).

        t_i = log mean_{j of i's product} exp(s_ij / T) - log mean_{j != i} exp(s_ij / T),  s_ij =
        background_i . foreground_j

    A triplet loss over all triplets of the batch at once (Sohn 2016): the embedding of the photo
    outside the box is to be no nearer to the product (clicked, or of the same label) than to the
    others. The gradient reaches the boxes, through `background`; foregrounds are constants. The
    mean is over photos with another one of their product.

    Args:
      background: embeddings of the photos outside their boxes, of length 1, float32 [B, D], divided
        over devices.
      all_foregrounds: embeddings of the photos inside their boxes, of length 1, float32 [B, D], on
        every device.
      label: class ids, int [B], divided over devices.
      all_labels: the same on every device, int [B].
      temperature: T.

    Returns:
      float32 scalar, 0 for a batch without two photos of one product.
    """
    scores = background @ jax.lax.stop_gradient(all_foregrounds).T / temperature
    positive = _positive_pairs(label, all_labels)
    other_photos = ~jnp.eye(len(label), dtype=bool)
    count = jnp.sum(positive, 1)

    def log_mean(pairs: Array, count: Array | int) -> Array:
        return jax.nn.logsumexp(jnp.where(pairs, scores, -1e9), 1) - jnp.log(jnp.maximum(count, 1))

    excess = log_mean(positive, count) - log_mean(other_photos, len(label) - 1)
    return jnp.sum(jnp.where(count > 0, jnp.maximum(excess, 0.0), 0.0)) / jnp.maximum(
        jnp.sum(count > 0), 1
    )


def _positive_pairs(label: Int[Array, " B"], all_labels: Int[Array, " N"]) -> Bool[Array, "B N"]:
    # Pairs of two photos of one product; False for a photo with itself.
    return (label[:, None] == all_labels) & ~jnp.eye(len(label), dtype=bool)


def box_regression_loss(box: Float[Array, "B 4"], target: Float[Array, "B 4"]) -> Float[Array, ""]:
    """Returns the mean absolute error of boxes whose true box is known.

    Args:
      box: left, top, right, bottom as fractions of the photo, float32 [B, 4].
      target: the true boxes, float32 [B, 4]; all zero where unknown.

    Returns:
      float32 scalar, a fraction of the photo's side; 0 for a batch without a known box.
    """
    is_known = jnp.any(target > 0, 1)
    error = jnp.mean(jnp.abs(box - target), 1)
    return jnp.sum(jnp.where(is_known, error, 0.0)) / jnp.maximum(jnp.sum(is_known), 1)


Batch = Mapping[str, jax.Array]  # arrays of a batch except its photos, by name
AuxiliaryLoss = Callable[[SicotOutputs, Batch], jax.Array]  # -> float32 scalar, weight included


def auxiliary_losses(config: LossConfig) -> dict[str, AuxiliaryLoss]:
    """Returns the loss terms that a config asks for besides the cross-entropy of the streams.

    Terms that compare photos with each other compare those of one device with those of all devices.

    Args:
      config: section `loss` of the config.

    Returns:
      Name of the config field -> function of (outputs of the network, batch) that returns the
      weighted term, a float32 scalar; terms of weight 0 are left out.
    """
    terms: dict[str, tuple[float, AuxiliaryLoss]] = {
        "tag_prediction": (config.tag_prediction, _tag_prediction(config)),
        "codes": (config.codes, _codes(config)),
        "background_suppression": (config.background_suppression, _background_suppression(config)),
        "box_regression": (config.box_regression, _box_regression(config)),
        "triplet": (config.triplet, _triplet(config)),
    }
    return {name: function for name, (weight, function) in terms.items() if weight}


def _required(output: jax.Array | None) -> jax.Array:
    """An output that the model computes because the config has this loss (`model.build_model`)."""
    assert output is not None
    return output


def _tag_prediction(config: LossConfig) -> AuxiliaryLoss:
    def loss(outputs: SicotOutputs, batch: Batch) -> jax.Array:
        term = tag_prediction_loss(_required(outputs.tag_logits), batch["token_ids"])
        return config.tag_prediction * term

    return loss


def _codes(config: LossConfig) -> AuxiliaryLoss:
    def loss(outputs: SicotOutputs, batch: Batch) -> jax.Array:
        code, unit = _required(outputs.binary_code), _required(outputs.unit_visual)
        similarity = code_similarity_loss(code, unit, mesh.replicate(code), mesh.replicate(unit))
        balance = config.code_balance * code_balance_loss(code)
        quantisation = config.code_quantisation * code_quantisation_loss(code)
        return config.codes * (similarity + balance + quantisation)

    return loss


def _background_suppression(config: LossConfig) -> AuxiliaryLoss:
    def loss(outputs: SicotOutputs, batch: Batch) -> jax.Array:
        foreground, label = _required(outputs.foreground), batch["label"]
        term = background_suppression_loss(
            _required(outputs.background),
            mesh.replicate(foreground),
            label,
            mesh.replicate(label),
        )
        # Without this a box that covers the photo, and leaves no background, would be best.
        log_area = jnp.mean(jnp.log(box_area(_required(outputs.box))))
        return config.background_suppression * (term + config.box_area * log_area)

    return loss


def _box_regression(config: LossConfig) -> AuxiliaryLoss:
    def loss(outputs: SicotOutputs, batch: Batch) -> jax.Array:
        return config.box_regression * box_regression_loss(_required(outputs.box), batch["box"])

    return loss


def _triplet(config: LossConfig) -> AuxiliaryLoss:
    def loss(outputs: SicotOutputs, batch: Batch) -> jax.Array:
        unit, label = _required(outputs.foreground), batch["label"]
        return config.triplet * triplet_loss(
            unit, mesh.replicate(unit), label, mesh.replicate(label), margin=config.triplet_margin
        )

    return loss
