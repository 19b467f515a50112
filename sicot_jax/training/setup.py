"""The functions and sizes of a training run that stay fixed: network, optimizer, head, schedule."""

from __future__ import annotations

import dataclasses

import jax
import optax
from flax import nnx

from sicot_jax.classifier.heads import Head, check_head, make_head
from sicot_jax.classifier.lazy_update import make_lazy_update
from sicot_jax.classifier.state import StepHyperparams, make_hyperparams
from sicot_jax.classifier.trust_ratio import make_trust_ratio
from sicot_jax.common.trees import path_name
from sicot_jax.config import Config, ConfigError
from sicot_jax.config.batch_plan import BatchPlan
from sicot_jax.training.model import (
    DataShape,
    ModelGraphs,
    compute_dtype,
    model_graphs,
    num_word_columns,
)
from sicot_jax.training.optimizer import make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed for a run: the functions and sizes behind the training step.

    Attributes:
      config: the run's config.
      shape: sizes of its catalogue.
      mesh: the devices.
      graphs: structure of the network.
      optimizer: optimizer of the streams and, row by row, of the class weights; its schedule has
        height 1, the learning rate comes with each update.
      head: loss, gradient and update of the classifier.
      batch_plan: records of each step.
      total_steps: updates of the complete run.
      steps_per_epoch: updates per epoch at the first batch size (a batch that grows needs fewer;
        `epoch_at` counts records).
    """

    config: Config
    shape: DataShape
    mesh: jax.sharding.Mesh
    graphs: ModelGraphs
    optimizer: optax.GradientTransformationExtraArgs
    head: Head
    batch_plan: BatchPlan
    total_steps: int
    steps_per_epoch: float

    @property
    def graphdef(self) -> nnx.GraphDef:
        """Structure of the complete network."""
        return self.graphs.model

    @property
    def visual_graphdef(self) -> nnx.GraphDef:
        """Structure of the visual stream."""
        return self.graphs.visual

    def hyperparams(self) -> StepHyperparams:
        """Returns the seed, learning rate and loss weights of the config as NumPy scalars."""
        return make_hyperparams(
            self.config.loss, learning_rate=self.config.optim.learning_rate, seed=self.config.seed
        )

    def epoch_at(self, step: int) -> float:
        """Returns the epochs that are complete before a step.

        Args:
          step: number of updates done.

        Returns:
          Epochs, a fraction.
        """
        return self.batch_plan.batches_before(step) / self.steps_per_epoch


def make_setup(config: Config, shape: DataShape, device_mesh: jax.sharding.Mesh) -> Setup:
    """Checks a config against data and mesh and builds the run's functions; allocates nothing.

    Args:
      config: the run's config.
      shape: sizes of its catalogue.
      device_mesh: the devices, or an abstract mesh.

    Returns:
      The setup.

    Raises:
      ConfigError: text is asked for and the catalogue has none, nothing trains, or the head cannot
        run with that many classes on that many devices.
    """
    _check_text(config, shape)
    check_head(config.head, num_classes=shape.num_classes, devices=device_mesh.size)
    graphs = model_graphs(config, shape)
    _check_trainable(config, graphs)
    batch_plan = config.train.batch_plan(shape.train_photos)
    total_steps = config.train.total_steps(shape.train_photos)
    # Height 1: the learning rate is an argument of the step, so that one program serves all rates.
    optim = dataclasses.replace(config.optim, learning_rate=1.0)
    schedule = make_schedule(optim, batch_plan, steps=total_steps, photos=shape.train_photos)
    optimizer = make_optimizer(optim, schedule)
    head = make_head(
        config.head,
        config.loss,
        num_classes=shape.num_classes,
        optimizer=optimizer,
        lazy_update=make_lazy_update(config.optim, schedule),
        trust_ratio=make_trust_ratio(config.optim),
        num_frozen_columns=num_word_columns(config, shape),
        dtype=compute_dtype(config),
    )
    return Setup(
        config=config,
        shape=shape,
        mesh=device_mesh,
        graphs=graphs,
        optimizer=optimizer,
        head=head,
        batch_plan=batch_plan,
        total_steps=total_steps,
        steps_per_epoch=shape.train_photos / config.train.batch_size,
    )


def check_batch_sizes(config: Config, device_mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the devices cannot divide a batch among them.

    Args:
      config: the run's config.
      device_mesh: the devices, or an abstract mesh.

    Raises:
      ConfigError: a micro-batch or evaluation batch is not a multiple of the number of devices.
    """
    devices = device_mesh.size
    sizes = {
        "train.batch_size / train.micro_batches": config.train.micro_batch_size,
        "eval.batch_size": config.eval.batch_size,
    }
    for name, size in sizes.items():
        if size % devices:
            raise ConfigError(
                f"{name}={size} is not divisible by {devices} devices; use a multiple of {devices}"
            )


def _check_text(config: Config, shape: DataShape) -> None:
    if shape.vocabulary_size >= 2:
        return
    if config.loss.with_text:
        raise ConfigError(
            "the catalogue has no titles, and loss.mixed or loss.tag_prediction needs them; import "
            "it with some (sicot import --titles-from RUN) or set both to 0 and "
            "model.shared_word_weights=False (baseline)"
        )
    if config.model.shared_word_weights:
        raise ConfigError(
            "the catalogue has no titles, and model.shared_word_weights=True needs them; set it to "
            "False, or import the catalogue with some (sicot import --titles-from RUN)"
        )


def _check_trainable(config: Config, graphs: ModelGraphs) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(graphs.params)
    names = [path_name(path) for path, _ in leaves]
    names += ["classifier/kernel", "classifier/bias"]
    if not any(config.optim.trains(name) for name in names):
        raise ConfigError(
            f"optim.trainable={config.optim.trainable!r} matches no parameter; e.g. classifier, "
            "visual/resnet"
        )
