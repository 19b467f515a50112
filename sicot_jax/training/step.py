"""The training step: forward pass, head, backward pass, gradient synchronization, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sicot_jax.classifier.state import (
    ClassifierState,
    Embeddings,
    Losses,
    StepHyperparams,
    stream_weights,
)
from sicot_jax.models.sicot import SicotOutputs
from sicot_jax.parallel import gradient_sync, mesh
from sicot_jax.parallel.array_types import Array, Shaped
from sicot_jax.training.augment import (
    Augmentation,
    augmented_boxes,
    draw_augmentation,
    network_input,
)
from sicot_jax.training.auxiliary_losses import AuxiliaryLoss, auxiliary_losses
from sicot_jax.training.optimizer import trained_parts
from sicot_jax.training.setup import Setup
from sicot_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Photos = tuple[jax.Array, Augmentation]  # uint8 [B, H, W, 3] and what was drawn for them
Tree = Any  # a tree of arrays
TrainStep = Callable[..., tuple[TrainState, Losses]]


class _Gradients(NamedTuple):
    """What forward and backward pass of a batch give.

    Attributes:
      losses: losses of the head.
      classifier: classifier after its update.
      gradient: gradient of the streams, stacked by device.
      batch_stats: batch statistics after the batch.
      values: values of the auxiliary losses.
    """

    losses: Losses
    classifier: ClassifierState
    gradient: Tree
    batch_stats: Tree
    values: dict[str, jax.Array]


def make_train_step(
    setup: Setup, *, extra_losses: Mapping[str, AuxiliaryLoss] | None = None
) -> TrainStep:
    """Builds the training step (state, batch[, hyperparams]) -> (state, losses), to be jitted.

    The streams run on each device by itself, except that batch-norm statistics are of all devices.
    Their gradients are synchronized once per step (`parallel.gradient_sync`).

    Of a batch in micro-batches only one is in memory at a time: a forward pass of each gives the
    embeddings, the head is called once on all of them, then each has another forward pass and the
    backward pass from its part of the cotangents. While one micro-batch is in the streams, the
    embeddings of the one before are gathered. Batch-norm statistics are those of each micro-batch;
    auxiliary losses are means over micro-batches. The number of micro-batches follows from the size
    of the batch, since theirs is fixed; each size of a batch that grows compiles once.

    Args:
      setup: the run's setup.
      extra_losses: name -> function of (network outputs, batch) that returns a float32 scalar,
        added to the total loss besides the auxiliary losses of the config.

    Returns:
      The step. Its batch holds "image" uint8 [B, H, W, 3], "label" int32 [B] and, as the config
      asks for them, "token_ids" int32 [B, T] and "box" float32 [B, 4]; without hyperparams those of
      the config are compiled in. The losses are float32 scalars: "total", the mean
      cross-entropy of each stream, and each auxiliary loss. The step raises ValueError when traced
      for a batch that micro-batches do not divide. To be jitted with the state donated.
    """
    step = _StepFunctions(setup, {**auxiliary_losses(setup.config.loss), **(extra_losses or {})})

    def train_step(
        state: TrainState, batch: Batch, hyperparams: StepHyperparams | None = None
    ) -> tuple[TrainState, Losses]:
        hyperparams = hyperparams or setup.hyperparams()
        photos, batch = step.augment(state, batch, hyperparams)
        stacked = gradient_sync.stack_per_device(state.params)
        micro_batches = step.num_micro_batches(len(batch["label"]))
        if micro_batches == 1:
            result = step.single_batch(stacked, state, photos, batch, hyperparams)
        else:
            parts = jax.tree.map(lambda x: split_batch(x, micro_batches), (photos, batch))
            result = step.micro_batched(stacked, state, parts, batch["label"], hyperparams)
        return step.update(state, result, hyperparams), total_losses(result.losses, result.values)

    return train_step


def total_losses(losses: Losses, values: Mapping[str, jax.Array]) -> Losses:
    """Adds auxiliary losses to those of the head.

    Args:
      losses: losses of the head, float32 scalars, with their sum "total".
      values: auxiliary losses, float32 scalars.

    Returns:
      All of them, with the sum of all as "total".
    """
    total = losses["total"] + sum(values.values(), jnp.zeros(()))
    return {**losses, **values, "total": total}


def split_batch(x: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "P B2 ..."]:
    """Splits an array into micro-batches such that no row changes its device.

    Args:
      x: [B, ...], divided over devices by row.
      parts: number of micro-batches P.

    Returns:
      [P, B / P, ...]; micro-batch p holds rows p, p + P, p + 2P, ...
    """
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    return x.reshape(shape, out_sharding=mesh.batch_spec(len(shape))).swapaxes(0, 1)


class _StepFunctions:
    """The parts of a training step; every method is pure and traced."""

    def __init__(self, setup: Setup, losses: Mapping[str, AuxiliaryLoss]):
        self.setup, self.config, self.losses = setup, setup.config, losses
        self.streams = tuple(stream_weights(self.config.loss))
        self.micro_batch = self.config.train.micro_batch_size
        # (a copy of the parameters per device, batch statistics, photos, token ids) -> (outputs,
        # new batch statistics)
        self.forward = jax.shard_map(
            self._forward_on_device,
            in_specs=(mesh.BATCH, jax.P(), mesh.BATCH, mesh.BATCH),
            out_specs=(mesh.BATCH, jax.P()),
        )

    def num_micro_batches(self, batch_size: int) -> int:
        parts, rest = divmod(batch_size, self.micro_batch)
        if rest or not parts:
            raise ValueError(
                f"a batch of {batch_size} photos, wanted a multiple of micro-batches of "
                f"{self.micro_batch}"
            )
        return parts

    def augment(
        self, state: TrainState, batch: Batch, hyperparams: StepHyperparams
    ) -> tuple[Photos, Batch]:
        """Draws the augmentation; the batch without its photos, boxes as the network sees them."""
        key = jax.random.fold_in(jax.random.key(hyperparams.seed), state.step)
        image = batch["image"]
        drawn = draw_augmentation(key, image, self.config.augment)
        batch = {name: value for name, value in batch.items() if name != "image"}
        if "box" in batch:
            batch["box"] = augmented_boxes(batch["box"], drawn, self.config.preprocessing)
        return (image, drawn), batch

    def single_batch(
        self,
        stacked: Tree,
        state: TrainState,
        photos: Photos,
        batch: Batch,
        hyperparams: StepHyperparams,
    ) -> _Gradients:
        """Forward and backward pass of a batch in one piece."""
        outputs, vjp, batch_stats = self._linearize(stacked, state.batch_stats, photos, batch)
        losses, cotangents, classifier = self.setup.head(
            self._embeddings(outputs), batch["label"], state.classifier, hyperparams
        )
        gradient, values = self._pull_back(outputs, vjp, batch, cotangents)
        return _Gradients(losses, classifier, gradient, batch_stats, values)

    def micro_batched(
        self,
        stacked: Tree,
        state: TrainState,
        parts: tuple[Photos, Batch],
        label: jax.Array,
        hyperparams: StepHyperparams,
    ) -> _Gradients:
        """Forward and backward pass of a batch that `split_batch` has split."""
        losses, cotangents, classifier = self.setup.head(
            self._embed_parts(stacked, state, parts), label, state.classifier, hyperparams
        )
        count = len(parts[1]["label"])

        def accumulate(carry: tuple[Tree, Tree], part: Any) -> Any:
            gradient, batch_stats = carry
            photos, batch, cotangents = part
            outputs, vjp, batch_stats = self._linearize(stacked, batch_stats, photos, batch)
            added, values = self._pull_back(outputs, vjp, batch, cotangents, count)
            return (jax.tree.map(jnp.add, gradient, added), batch_stats), values

        start = (jax.tree.map(jnp.zeros_like, stacked), state.batch_stats)
        cotangent_parts = jax.tree.map(lambda x: split_batch(x, count), cotangents)
        (gradient, batch_stats), values = jax.lax.scan(accumulate, start, (*parts, cotangent_parts))
        means = jax.tree.map(jnp.mean, values)
        return _Gradients(losses, classifier, gradient, batch_stats, means)

    def update(
        self, state: TrainState, result: _Gradients, hyperparams: StepHyperparams
    ) -> TrainState:
        """Synchronizes the streams' gradients and updates their parameters."""
        residual: gradient_sync.Residual = {}
        if state.residual:
            gradient, residual = gradient_sync.topk_allreduce(
                result.gradient, state.residual, ratio=self.config.train.gradient_ratio
            )
        else:
            gradient = gradient_sync.allreduce(result.gradient)
        updates, opt_state = self.setup.optimizer.update(
            gradient, state.opt_state, state.params, learning_rate=hyperparams.learning_rate
        )
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=result.batch_stats,
            opt_state=opt_state,
            classifier=result.classifier,
            residual=residual,
        )

    def _forward_on_device(
        self, stacked: Tree, batch_stats: Tree, photos: Photos, token_ids: jax.Array | None
    ) -> tuple[SicotOutputs, Tree]:
        params = gradient_sync.local_part(stacked)
        net = nnx.merge(self.setup.graphdef, params, batch_stats, copy=True)
        image = network_input(*photos, self.config.preprocessing)
        outputs = net(image, token_ids, train=trained_parts(self.config.optim, params))
        return outputs, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    def _embeddings(self, outputs: SicotOutputs) -> Embeddings:
        return outputs.streams(self.streams)

    def _linearize(
        self, stacked: Tree, batch_stats: Tree, photos: Photos, batch: Batch
    ) -> tuple[SicotOutputs, Callable[[SicotOutputs], tuple[Tree]], Tree]:
        """Outputs, pull-back to each device's copy of the parameters, new batch statistics."""
        return jax.vjp(
            lambda p: self.forward(p, batch_stats, photos, batch.get("token_ids")),
            stacked,
            has_aux=True,
        )

    def _auxiliary(
        self, outputs: SicotOutputs, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = {name: function(outputs, batch) for name, function in self.losses.items()}
        return sum(values.values(), jnp.zeros(())), values

    def _pull_back(
        self,
        outputs: SicotOutputs,
        vjp: Callable[[SicotOutputs], tuple[Tree]],
        batch: Batch,
        cotangents: Embeddings,
        parts: int = 1,
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """Gradient of the head's and the auxiliary losses, and the latters' values."""
        (_, values), extra = jax.value_and_grad(self._auxiliary, has_aux=True)(outputs, batch)
        # The head's loss is a mean over the complete batch, the auxiliary ones over this part.
        full = jax.tree.map(lambda x: x / parts, extra)
        full = dataclasses.replace(
            full, **{name: getattr(full, name) + x for name, x in cotangents.items()}
        )
        return vjp(full)[0], values

    def _embed_parts(
        self, stacked: Tree, state: TrainState, parts: tuple[Photos, Batch]
    ) -> Embeddings:
        """Embeddings [B, D] of all micro-batches on every device, in the batch's order."""

        def embed(before: Embeddings, part: tuple[Photos, Batch]) -> Any:
            photos, batch = part
            # Gathered while these photos are in the streams.
            gathered = jax.tree.map(mesh.replicate, before)
            outputs, _ = self.forward(stacked, state.batch_stats, photos, batch.get("token_ids"))
            return self._embeddings(outputs), gathered

        def concatenate(gathered: jax.Array, last: jax.Array) -> jax.Array:
            x = jnp.concatenate([gathered[1:], mesh.replicate(last)[None]])  # [P, B / P, D]
            return x.swapaxes(0, 1).reshape(-1, x.shape[-1])

        shape = (self.micro_batch, state.classifier.weights.width)
        start = jnp.zeros(shape, out_sharding=mesh.batch_spec(2))
        last, gathered = jax.lax.scan(embed, dict.fromkeys(self.streams, start), parts)
        return jax.tree.map(concatenate, gathered, last)
