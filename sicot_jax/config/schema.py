"""The config of a run: its sections and the rules between them."""

from __future__ import annotations

import dataclasses
from typing import Any

from sicot_jax.config.batch_plan import num_triplets
from sicot_jax.config.checks import ConfigError
from sicot_jax.config.data import AugmentConfig, DataConfig
from sicot_jax.config.model import HeadConfig, LossConfig, ModelConfig
from sicot_jax.config.optimization import EvalConfig, MeshConfig, OptimConfig, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing

CONFIG_FORMAT = 1

# Fields that may differ between a run and its continuation: where and how fast it runs, not what it
# computes.
FREE_ON_RESUME = (
    "mesh.data",
    "mesh.model",
    "data.path",
    "data.workers",
    "data.on_device",
    "data.triplets",  # the file's content may not
    "data.queries",
    "train.checkpoint_every_seconds",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.tensorboard",
    "eval.batch_size",
    "eval.class_chunk",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; where it writes is `--workdir`.

    Every section checks its fields when it is made; rules between sections are checked here.

    Attributes:
      seed: seed of initialisation, sampling and augmentation, 0 to 2^32 - 1.
      data: records and titles.
      preprocessing: photo geometry and normalisation.
      augment: training augmentation.
      model: the network.
      loss: weights of the loss terms.
      head: computation of the classifier's loss and update.
      optim: optimizer and schedule.
      train: training loop.
      mesh: devices.
      eval: validation and test.

    Raises:
      ConfigError: a field outside its range, or fields that exclude each other.
    """

    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # jax's keys take no more
            raise ConfigError(f"seed={self.seed}, wanted 0 to 2^32 - 1")
        _check_optimizer(self)
        _check_shared_word_weights(self)
        _check_localization(self)
        _check_batch(self)
        if self.loss.with_text and self.data.title == "none":
            raise ConfigError(
                "data.title='none' leaves nothing to read; set loss.mixed=0 and "
                "loss.tag_prediction=0"
            )


def _check_optimizer(config: Config) -> None:
    """Checks what optimizers and sampled heads can and cannot do together."""
    optim, head = config.optim, config.head
    if config.train.gradient_ratio < 1 and optim.name != "sgd":
        raise ConfigError(
            f"train.gradient_ratio={config.train.gradient_ratio} with optim.name={optim.name!r}, "
            "which scales a step by the norm of a gradient of which parts are missing; set "
            "optim.name=sgd or train.gradient_ratio=1"
        )
    if config.loss.label_smoothing and head.sampled:
        raise ConfigError(
            f"loss.label_smoothing={config.loss.label_smoothing} with head.kind={head.kind!r}, "
            "which does not see all classes; set head.kind=class_sharded or loss.label_smoothing=0"
        )
    if head.sampled and optim.name != "sgd":
        reason = "rows that miss steps can be brought up to date for sgd alone"
        if optim.name == "lars":
            reason = "the norm of a kernel whose rows are not all up to date is not its norm"
        raise ConfigError(
            f"head.kind={head.kind!r} with optim.name={optim.name!r}: {reason}; set "
            "optim.name=sgd or head.kind=class_sharded"
        )


def _check_shared_word_weights(config: Config) -> None:
    """Checks that head, optimizer and titles allow shared word weights."""
    if not config.model.shared_word_weights:
        return
    if config.head.sampled:
        raise ConfigError(
            f"model.shared_word_weights=True with head.kind={config.head.kind!r}, whose rows decay "
            "after the steps that they missed; set head.kind=class_sharded or "
            "model.shared_word_weights=False"
        )
    if config.optim.name == "lars":
        raise ConfigError(
            "model.shared_word_weights=True with optim.name='lars', whose steps follow the norm of "
            "rows of which a part is constant; set optim.name=sgd or "
            "model.shared_word_weights=False"
        )
    if config.data.title == "none":
        raise ConfigError(
            "model.shared_word_weights=True with data.title='none': there are no titles to take "
            "words from; change one of the two"
        )


def _check_localization(config: Config) -> None:
    """Checks that there is a box branch, and boxes, where a loss needs them."""
    loss = config.loss
    if config.model.localization == "none" and (loss.background_suppression or loss.box_regression):
        raise ConfigError(
            "loss.background_suppression or loss.box_regression with model.localization='none': "
            "there is no box to learn; set model.localization to image or features"
        )
    if loss.box_regression and config.data.on_device:
        raise ConfigError(
            "loss.box_regression with data.on_device=True, which keeps photos but no boxes; set "
            "data.on_device=False"
        )


def _check_batch(config: Config) -> None:
    """Checks that a micro-batch holds the pairs and triplets that losses compare."""
    train, micro_batch = config.train, config.train.micro_batch_size
    if config.loss.codes and micro_batch < 2:
        raise ConfigError(
            f"loss.codes={config.loss.codes} with one photo at a time (train.batch_size="
            f"{train.batch_size} / train.micro_batches={train.micro_batches}): codes are learned "
            "from pairs; lower train.micro_batches"
        )
    if config.data.triplets and not num_triplets(micro_batch, config.data.triplet_share):
        raise ConfigError(
            f"data.triplet_share={config.data.triplet_share} of a micro-batch of {micro_batch} "
            "photos holds no triplet; raise it or train.batch_size"
        )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns a config, or a section of one, as nested dicts.

    Args:
      config: the dataclass.

    Returns:
      Field name -> value, or a dict for a section.
    """
    return dataclasses.asdict(config)


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}.

    Args:
      tree: nested dicts, as `config_to_dict` gives them.
      prefix: put before every name.

    Returns:
      Full field name -> value.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= flatten_config(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
