"""Validation during training: accuracy, and which state is the best so far."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.training.predict import (
    Arrays,
    VisualWeights,
    make_predict_step,
    predict_split,
    visual_weights,
)
from sicot_jax.training.results import summarize_accuracy
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Accuracy of one validation.

    Attributes:
      scalars: name -> number, for the log: top-1 and top-3 of each group in per cent, and
        "log_prob", the mean log-probability of the label.
      summary: one line for the terminal.
      score: numbers by which states are compared: [overall top-1, log_prob]. A small validation
        split ties often; the log-probability decides then.
    """

    scalars: dict[str, float]
    summary: str
    score: list[float]


class Validator:
    """Computes the accuracy of a state on the validation split; compiled at the first call."""

    def __init__(self, setup: Setup, catalog: Catalog):
        self.setup, self.catalog = setup, catalog

    @functools.cached_property
    def _predict_step(self) -> Callable[[VisualWeights, jax.Array, jax.Array], Arrays]:
        setup = self.setup
        return make_predict_step(setup.config, setup.visual_graphdef, setup.shape.num_classes)

    def __call__(self, state: TrainState) -> ValidationResult | None:
        """Validates a state.

        Args:
          state: the state.

        Returns:
          The result; None where the catalogue has no validation photos.
        """
        config, split = self.setup.config, self.catalog.splits["validation"]
        if not len(split):
            return None
        predictions = predict_split(
            self._predict_step,
            visual_weights(state),
            split,
            config,
            self.setup.mesh,
            max_photos=config.eval.max_photos,
        )
        groups = summarize_accuracy(predictions, self.catalog, config)
        scalars = {
            f"{group}_{k}": row[k]
            for group, row in groups.items()
            for k in ("top1", "top3")
            if row[k] is not None
        }
        scalars["log_prob"] = float(np.mean(predictions.label_log_prob))
        summary = "  ".join(
            f"{group} {row['top1']:.2f}" for group, row in groups.items() if row["top1"] is not None
        )
        score = [scalars["overall_top1"], scalars["log_prob"]]
        return ValidationResult(scalars, summary, score)


def is_finite(state: TrainState) -> bool:
    """Returns whether all weights and statistics of a state are finite numbers.

    Args:
      state: the state.

    Returns:
      Whether they are; waits for the device.
    """
    return bool(_all_finite((state.params, state.batch_stats, state.classifier.weights)))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
