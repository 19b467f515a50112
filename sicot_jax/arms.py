"""What is compared: named changes of one config, each an override or a few."""

from __future__ import annotations

from sicot_jax.config import Config, ConfigError, override

_IMAGES_ALONE = ("loss.visual=1", "loss.semantic=0", "loss.mixed=0")
_CO_TRAINING = ("loss.visual=1", "loss.semantic=0", "loss.mixed=1")
_BALANCED = ("loss.logit_adjustment=1",)

# Name -> what it changes. Everything else is the config's own.
ARMS: dict[str, tuple[str, ...]] = {
    "baseline": _IMAGES_ALONE,
    # Two terms double the gradient of the classifier; so does this, without text.
    "doubled_baseline": ("loss.visual=2", "loss.semantic=0", "loss.mixed=0"),
    "co_training": _CO_TRAINING,
    # Ren et al. 2020: the log prior added to the logits in training.
    "balanced_softmax": (*_IMAGES_ALONE, *_BALANCED),
    "co_training_balanced": (*_CO_TRAINING, *_BALANCED),
    # What remains with the titles of other photos is no knowledge from text.
    "co_training_shuffled": (*_CO_TRAINING, "data.title=shuffled"),
    "co_training_masked": (*_CO_TRAINING, "data.title=masked"),
    "co_training_word_dropout": (*_CO_TRAINING, "data.word_dropout=0.5"),
}


def arm(config: Config, name: str) -> Config:
    """The config of that arm. ConfigError for a name that is none."""
    if name not in ARMS:
        raise ConfigError(f"no arm {name}; arms are {', '.join(ARMS)}")
    return override(config, ARMS[name])
