"""Named variants of one config that experiments compare; each changes a few fields."""

from __future__ import annotations

import dataclasses

from sicot_jax.config import TEXT_ENCODERS, Config, ConfigError, override_config


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant changes; everything else is as in the config.

    Attributes:
      overrides: fields and values, "section.field=value".
      starts_from: variant whose finished run, of the same seed and of that variant's best learning
        rate, it starts from; "" for random weights.
      epochs: factor of the config's epochs.
    """

    overrides: tuple[str, ...]
    starts_from: str = ""
    epochs: float = 1.0


_NO_TAGS = ("loss.tag_prediction=0", "model.shared_word_weights=False")
_BASELINE = ("loss.visual=1", "loss.mixed=0", *_NO_TAGS)
_CO_TRAINING = ("loss.visual=1", "loss.mixed=1", *_NO_TAGS)
_TAGS = ("loss.tag_prediction=1", "model.shared_word_weights=True")
_BALANCED = ("loss.logit_adjustment=1",)
# Classifier retraining after Kang et al. 2020: the classifier alone, classes equally often; here it
# starts from the trained one, in the paper from random weights.
_RETRAINING = (*_BASELINE, "optim.trainable=classifier", "data.sampling=class_balanced")

VARIANTS: dict[str, Variant] = {
    "baseline": Variant(_BASELINE),
    # Whether the baseline has converged.
    "baseline_longer": Variant(_BASELINE, epochs=1.5),
    # Two loss terms double the classifier's gradient; so does this, without text.
    "doubled_baseline": Variant((*_BASELINE, "loss.visual=2")),
    "co_training": Variant(_CO_TRAINING),
    # Balanced softmax (Ren et al. 2020): the log prior is added to the logits in training.
    "balanced_softmax": Variant((*_BASELINE, *_BALANCED)),
    "co_training_balanced": Variant((*_CO_TRAINING, *_BALANCED)),
    # A gain that remains with the titles of other photos does not come from text.
    "co_training_shuffled": Variant((*_CO_TRAINING, "data.title=shuffled")),
    "co_training_shuffled_within_class": Variant(
        (*_CO_TRAINING, "data.title=shuffled_within_class")
    ),
    "co_training_masked": Variant((*_CO_TRAINING, "data.title=masked")),
    # Further long-tail controls, alone and with co-training.
    "class_balanced": Variant((*_BASELINE, "data.sampling=class_balanced")),
    "co_training_class_balanced": Variant((*_CO_TRAINING, "data.sampling=class_balanced")),
    "square_root": Variant((*_BASELINE, "data.sampling=square_root")),
    "co_training_square_root": Variant((*_CO_TRAINING, "data.sampling=square_root")),
    "label_smoothing": Variant((*_BASELINE, "loss.label_smoothing=0.1")),
    "co_training_label_smoothing": Variant((*_CO_TRAINING, "loss.label_smoothing=0.1")),
    "classifier_retraining": Variant(_RETRAINING, starts_from="baseline", epochs=1 / 3),
    "co_training_classifier_retraining": Variant(
        _RETRAINING, starts_from="co_training", epochs=1 / 3
    ),
    # Words of titles: predicted from the photo, shared by class weights, and both.
    "tag_prediction": Variant((*_BASELINE, "loss.tag_prediction=1")),
    "shared_word_weights": Variant((*_BASELINE, "model.shared_word_weights=True")),
    "tag_prediction_shared_weights": Variant((*_BASELINE, *_TAGS)),
    "tag_prediction_shared_weights_balanced": Variant((*_BASELINE, *_TAGS, *_BALANCED)),
    "tag_prediction_shared_weights_shuffled": Variant((*_BASELINE, *_TAGS, "data.title=shuffled")),
    "tag_prediction_shared_weights_masked": Variant((*_BASELINE, *_TAGS, "data.title=masked")),
    "co_training_tag_prediction_shared_weights": Variant((*_CO_TRAINING, *_TAGS)),
    # Table 3 of SICoT: how a title becomes a vector.
    **{
        f"text_{name}": Variant((*_CO_TRAINING, f"model.text.encoder={name}"))
        for name in TEXT_ENCODERS
        if name != "bilinear"
    },
}


def make_variant(config: Config, name: str) -> Config:
    """Returns the config of a variant.

    Args:
      config: config that the variant changes.
      name: one of VARIANTS.

    Returns:
      The changed config.

    Raises:
      ConfigError: no such variant, or one that this config cannot have.
    """
    if name not in VARIANTS:
        raise ConfigError(f"no variant {name}; variants are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    try:
        changed = override_config(config, variant.overrides)
    except ConfigError as error:
        raise ConfigError(f"variant {name}: {error}; or leave this variant out") from error
    if variant.epochs == 1:
        return changed
    train = dataclasses.replace(
        changed.train,
        epochs=float(f"{variant.epochs * changed.train.epochs:.6g}"),
        steps=round(variant.epochs * changed.train.steps),
    )
    return dataclasses.replace(changed, train=train)
