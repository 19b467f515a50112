"""Loss terms that a training step adds to the classifier's: tags, codes, localization, triplets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sicot_jax.config import LossConfig
from sicot_jax.models.localization import box_area
from sicot_jax.models.sicot import SicotOutputs
from sicot_jax.parallel import mesh
from sicot_jax.training.auxiliary_losses import (
    background_suppression_loss,
    box_regression_loss,
    code_balance_loss,
    code_quantisation_loss,
    code_similarity_loss,
    tag_prediction_loss,
    triplet_loss,
)

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
