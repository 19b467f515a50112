"""What is compared: named changes of one config, each an override or a few."""

from __future__ import annotations

import dataclasses

from sicot_jax.config import TEXT_ENCODERS, Config, ConfigError, override_config


@dataclasses.dataclass(frozen=True)
class Arm:
    """What an arm changes; everything else is the config's own.

    after: the arm whose finished run it starts from, at that arm's learning rate and with the same
      seed.
    epochs: times the config's.
    """

    overrides: tuple[str, ...]
    after: str = ""
    epochs: float = 1.0


_NO_WORDS = ("loss.tag_prediction=0", "model.shared_word_weights=False")
_IMAGES_ALONE = ("loss.visual=1", "loss.mixed=0", *_NO_WORDS)
_CO_TRAINING = ("loss.visual=1", "loss.mixed=1", *_NO_WORDS)
_TITLE_WORDS = (*_IMAGES_ALONE, "loss.tag_prediction=1", "model.shared_word_weights=True")
_BALANCED = ("loss.logit_adjustment=1",)
# After Kang et al. 2020 (cRT): the classifier alone is trained on, classes equally often; it goes
# on from the trained one where theirs begins anew.
_AGAIN = (*_IMAGES_ALONE, "optim.trainable=classifier", "data.sampling=class_balanced")

ARMS: dict[str, Arm] = {
    "baseline": Arm(_IMAGES_ALONE),
    # Whether the baseline had converged.
    "baseline_longer": Arm(_IMAGES_ALONE, epochs=1.5),
    # Two terms double the gradient of the classifier; so does this, without text.
    "doubled_baseline": Arm((*_IMAGES_ALONE, "loss.visual=2")),
    "co_training": Arm(_CO_TRAINING),
    # Ren et al. 2020: the log prior added to the logits in training.
    "balanced_softmax": Arm((*_IMAGES_ALONE, *_BALANCED)),
    "co_training_balanced": Arm((*_CO_TRAINING, *_BALANCED)),
    # What remains with the titles of other photos is no knowledge from text.
    "co_training_shuffled": Arm((*_CO_TRAINING, "data.title=shuffled")),
    "co_training_shuffled_within_class": Arm((*_CO_TRAINING, "data.title=shuffled_within_class")),
    "co_training_masked": Arm((*_CO_TRAINING, "data.title=masked")),
    # Further long-tail controls, alone and with co-training.
    "class_balanced": Arm((*_IMAGES_ALONE, "data.sampling=class_balanced")),
    "co_training_class_balanced": Arm((*_CO_TRAINING, "data.sampling=class_balanced")),
    "square_root": Arm((*_IMAGES_ALONE, "data.sampling=square_root")),
    "co_training_square_root": Arm((*_CO_TRAINING, "data.sampling=square_root")),
    "label_smoothing": Arm((*_IMAGES_ALONE, "loss.label_smoothing=0.1")),
    "co_training_label_smoothing": Arm((*_CO_TRAINING, "loss.label_smoothing=0.1")),
    "crt": Arm(_AGAIN, after="baseline", epochs=1 / 3),
    "co_training_crt": Arm(_AGAIN, after="co_training", epochs=1 / 3),
    # The words of titles: told from the photo, shared by classifier rows, and both ("title_words").
    "words_told": Arm((*_IMAGES_ALONE, "loss.tag_prediction=1")),
    "word_rows": Arm((*_IMAGES_ALONE, "model.shared_word_weights=True")),
    "title_words": Arm(_TITLE_WORDS),
    "title_words_balanced": Arm((*_TITLE_WORDS, *_BALANCED)),
    "title_words_shuffled": Arm((*_TITLE_WORDS, "data.title=shuffled")),
    "title_words_masked": Arm((*_TITLE_WORDS, "data.title=masked")),
    "co_training_title_words": Arm((*_CO_TRAINING, "loss.tag_prediction=1", "model.shared_word_weights=True")),
    # Table 3 of SICoT: how a title becomes a vector.
    **{
        f"text_{name}": Arm((*_CO_TRAINING, f"model.text.encoder={name}"))
        for name in TEXT_ENCODERS
        if name != "bilinear"
    },
}


def arm(config: Config, name: str) -> Config:
    """The config of that arm. ConfigError for a name that is none, or an arm that the config cannot
    take.
    """
    if name not in ARMS:
        raise ConfigError(f"no arm {name}; arms are {', '.join(ARMS)}")
    try:
        chosen = override_config(config, ARMS[name].overrides)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}; or leave this arm out") from error
    if ARMS[name].epochs == 1:
        return chosen
    epochs = float(f"{ARMS[name].epochs * chosen.train.epochs:.6g}")
    steps = round(ARMS[name].epochs * chosen.train.steps)
    return dataclasses.replace(
        chosen, train=dataclasses.replace(chosen.train, epochs=epochs, steps=steps)
    )
