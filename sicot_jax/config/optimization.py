"""Config sections of optimizer, training loop, device mesh and evaluation."""

from __future__ import annotations

import dataclasses
import re

from sicot_jax.config.batch_plan import BatchPlan
from sicot_jax.config.checks import ConfigError, FieldChecks


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Sets optimizer and learning-rate schedule: `optim.*`.

    The defaults, except for momentum and weight decay, are those of SICoT, section 4.3.

    Attributes:
      name: "sgd", "lars" (for large batches; its learning rates are above 1) or "adamw".
      learning_rate: learning rate after the warm-up.
      momentum: momentum of "sgd" and "lars".
      nesterov: Nesterov momentum.
      weight_decay: weight decay of arrays with two axes or more.
      trust_coefficient: trust coefficient of "lars": the share of its norm by which a kernel
        moves per step at learning rate 1 (You et al. 2017).
      schedule: "step", "exponential", "cosine" or "constant".
      gamma: factor of "step" and "exponential" every `decay_epochs`.
      decay_epochs: epochs between two such factors.
      warmup_epochs: epochs of linear warm-up.
      trainable: regular expression, matched from the start of parameter names ("visual/...",
        "semantic/...", "classifier/kernel"): "classifier" trains the classifier alone,
        "(?!visual/resnet)" freezes the backbone.

    Raises:
      ConfigError: a field outside its range.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    trust_coefficient: float = 0.001
    schedule: str = "step"
    gamma: float = 0.8
    decay_epochs: float = 1.0
    warmup_epochs: float = 0.0
    trainable: str = ""

    def __post_init__(self) -> None:
        check = FieldChecks("optim", self)
        check.finite()
        check.choice("name", ("sgd", "lars", "adamw"))
        check.choice("schedule", ("step", "exponential", "cosine", "constant"))
        check.positive("learning_rate", "gamma", "decay_epochs", "trust_coefficient")
        check.not_negative("weight_decay", "warmup_epochs")
        if not 0 <= self.momentum < 1:
            check.refuse("momentum", "0 up to (not including) 1")
        try:
            re.compile(self.trainable)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"optim.trainable={self.trainable!r} is no regular expression: {error}"
            ) from error

    def trains(self, name: str) -> bool:
        """Returns whether a parameter is trained.

        Args:
          name: path name of the parameter, e.g. "visual/resnet/conv1/kernel".

        Returns:
          Whether `trainable` matches from the start of the name.
        """
        return re.match(self.trainable, name) is not None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Sets the training loop: `train.*`.

    Attributes:
      batch_size: B, photos per step over all devices.
      epochs: length of the run.
      steps: length of the run in steps, instead of `epochs`; 0 uses `epochs`.
      micro_batches: parts of the batch that pass the backbone one after the other (gradient
        accumulation). Raise it where the batch does not fit in memory.
      gradient_ratio: share of each kernel's gradient, the largest entries, that a device sends per
        step; the remainder is added to its next gradients (top-k compression with error feedback).
        1 sends everything. Below 1 / devices it saves traffic, for slow connections.
      grow_every_epochs: epochs after which the batch doubles, again and again up to
        `max_micro_batches`, the micro-batch staying as it is; 0 keeps `batch_size` (Smith et al.
        2018). For fewer, larger steps late in training on many devices.
      max_micro_batches: micro-batches of the largest batch of `grow_every_epochs`.
      compute_dtype: "float32" or "bfloat16".
      evaluate_every_epochs: epochs between two validations, which choose the best state.
      checkpoint_every_seconds: seconds between two checkpoints of the last state.
      checkpoint_every_steps: steps between two checkpoints besides; 0 for none. For machines that
        may stop at any time, where the loss in steps has to be bounded.
      log_every_steps: steps between two lines of the log.
      tensorboard: write TensorBoard event files too.

    Raises:
      ConfigError: a field outside its range, or fields that exclude each other.
    """

    batch_size: int = 256
    epochs: float = 10.0
    steps: int = 0
    micro_batches: int = 1
    gradient_ratio: float = 1.0
    grow_every_epochs: float = 0.0
    max_micro_batches: int = 0
    compute_dtype: str = "float32"
    evaluate_every_epochs: float = 1.0
    checkpoint_every_seconds: float = 120.0
    checkpoint_every_steps: int = 0
    log_every_steps: int = 20
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check = FieldChecks("train", self)
        check.finite()
        check.choice("compute_dtype", ("float32", "bfloat16"))
        check.positive("batch_size", "micro_batches", "log_every_steps", "evaluate_every_epochs")
        check.not_negative("grow_every_epochs", "max_micro_batches")
        check.not_negative("checkpoint_every_seconds", "checkpoint_every_steps")
        if not (self.steps or self.epochs) > 0:
            raise ConfigError(
                f"steps or epochs={self.steps or self.epochs}, wanted a positive number"
            )
        if not 0 < self.gradient_ratio <= 1:
            check.refuse("gradient_ratio", "above 0, up to 1")
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not divisible by train.micro_batches="
                f"{self.micro_batches}; change one"
            )
        self._check_growth()

    def _check_growth(self) -> None:
        if not (self.grow_every_epochs or self.max_micro_batches):
            return
        if not (self.grow_every_epochs and self.max_micro_batches):
            raise ConfigError(
                f"train.grow_every_epochs={self.grow_every_epochs} with train.max_micro_batches="
                f"{self.max_micro_batches}: a growing batch needs both; set both, or both to 0"
            )
        factor, remainder = divmod(self.max_micro_batches, self.micro_batches)
        if remainder or factor < 2 or factor & (factor - 1):
            raise ConfigError(
                f"train.max_micro_batches={self.max_micro_batches}, wanted train.micro_batches="
                f"{self.micro_batches} doubled once or more often"
            )

    @property
    def micro_batch_size(self) -> int:
        """Photos of one micro-batch over all devices."""
        return self.batch_size // self.micro_batches

    def total_steps(self, train_photos: int) -> int:
        """Returns the steps of the complete run.

        Args:
          train_photos: N, training photos of the catalogue.

        Returns:
          Steps, at least one.
        """
        batches = max(1, round(self.epochs * train_photos / self.batch_size))
        return self.steps or self.batch_plan(train_photos).steps_for(batches)

    def batch_plan(self, train_photos: int) -> BatchPlan:
        """Returns the batch size of every step.

        Args:
          train_photos: N, training photos of the catalogue.

        Returns:
          The plan; `grow_every_epochs` doubles its batches.

        Raises:
          ConfigError: the batch would grow before the first step.
        """
        doublings = (
            (self.max_micro_batches // self.micro_batches).bit_length() - 1
            if self.grow_every_epochs
            else 0
        )
        every = self.grow_every_epochs * train_photos / self.batch_size
        if doublings and every < 1:
            raise ConfigError(
                f"train.grow_every_epochs={self.grow_every_epochs} is {every:.2g} steps of "
                f"{self.batch_size} of {train_photos} photos, wanted one or more; raise it"
            )
        return BatchPlan.with_doublings(self.batch_size, doublings=doublings, every=every)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sets the devices along each axis of the mesh: `mesh.*`.

    Attributes:
      data: devices along the batch axis; 0 uses all devices that `model` leaves. Set it to use
        fewer devices than there are.
      model: devices along the class axis of the classifier. Raise it where the classifier does not
        fit on the devices of one batch group.

    Raises:
      ConfigError: a field outside its range.
    """

    data: int = 0
    model: int = 1

    def __post_init__(self) -> None:
        check = FieldChecks("mesh", self)
        check.positive("model")
        check.not_negative("data")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Sets validation and test: `eval.*`.

    Attributes:
      batch_size: photos per evaluation step over all devices.
      max_photos: test photos that are read; 0 reads all.
      top_k: K, classes kept for each photo (fewer where the catalogue has fewer).
      class_chunk: classes per block on a device; bounds the temporary memory at batch_size *
        class_chunk logits a device. Lower it where an evaluation runs out of memory.
      analysis_up_to_classes: number of classes up to which the run is analysed; with more the test
        keeps no embeddings and tries no post-hoc adjustments, each of which multiplies photos with
        all classes once more and may copy the kernel. Raise it where memory and time allow.

    Raises:
      ConfigError: a field outside its range.
    """

    batch_size: int = 256
    max_photos: int = 0
    top_k: int = 10
    class_chunk: int = 16384
    analysis_up_to_classes: int = 50_000

    def __post_init__(self) -> None:
        check = FieldChecks("eval", self)
        check.positive("batch_size", "top_k", "class_chunk")
        check.not_negative("max_photos", "analysis_up_to_classes")
        if self.top_k < 3:
            check.refuse("top_k", "3 or more: the tables show top-1 and top-3")
