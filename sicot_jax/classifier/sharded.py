"""The co-training loss and the update of the class weights, with classes divided over all devices.

Each device owns rows [C / devices, D] and runs through them, or through those that take part, in
chunks, twice. First pass: a running maximum and sum of exponentials for each embedding. Second
pass: the chunk's probabilities (computed again, or from kept logits), its gradient, and at once its
update, so that no gradient of the size of the kernel ever exists. The embeddings of all streams are
stacked: one product with a chunk serves all. An optimizer that needs norms of the complete gradient
(LARS) costs a pass between the two: logits and gradient of each chunk once more, for two sums.

Between devices travel the embeddings [S * B, D], their gradient, and vectors of length S * B;
nothing that grows with the number of classes. `losses` is the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.shard_passes import ShardPasses
from sicot_jax.classifier.streaming import ActiveRows
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Int


def loss_and_update(
    embeddings: Mapping[str, Array],
    label: Int[Array, " B"],
    state: RowState,
    log_prior: Float[Array, " C"],
    *,
    stream_weights: Mapping[str, Any],
    options: StreamingOptions,
    row_update: RowUpdate,
    active: Int[Array, " A"] | None = None,
) -> tuple[dict[str, Array], dict[str, Array], RowState]:
    """Computes the loss, its gradient and updated class weights, a chunk at a time.

    The loss is `losses.co_training_loss`. Row r = (s, b) is the embedding x_r of photo b in stream
    s, and y_r its class. With the class weights w_c and the offset of class c (its bias, and tau *
    log prior under logit adjustment):

        z_rc = x_r . w_c + offset_c                         logit
        q_rc = (1 - smoothing) [c = y_r] + smoothing / C    target: smoothed one-hot label
        g_rc = softmax(z_r)_c - q_rc                        dL/dz_rc is a_r g_rc
        a_r = stream_weights[s] / B                         share of row r in the loss
        dL/dx_r = a_r sum_c g_rc w_c
        dL/dw_c = sum_r a_r g_rc x_r

    The sums over c are exact, over all classes or over the active ones. Where the loss is not
    finite nothing is updated.

    Args:
      embeddings: stream -> float32 [B, D], divided by batch, or equal on all devices.
      label: class ids, int32 [B], divided by batch.
      state: state of the classifier, rows divided over all devices; to be donated.
      log_prior: log share of each class in the training photos, float32 [C], divided by class.
      stream_weights: stream -> weight, numbers or scalars that all devices have; only the streams
        named here count.
      options: settings fixed at compile time: number of classes, logit adjustment, label smoothing,
        rows of a chunk, dtype of the products.
      row_update: optimizer step of a chunk: from the rows' weights, optimizer state and gradient to
        their new ones.
      active: row indices (among a device's rows) of the classes that take part, -1 for an empty
        slot, int32 [devices * A], divided over devices; the labels' classes must be among them, and
        none twice. None for all classes.

    Returns:
      Losses ("total", and each stream's mean cross-entropy), float32 scalars; gradients, stream ->
      float32 [B, D], divided by batch; the new state.
    """
    streams = tuple(stream_weights)
    stacked = mesh.replicate(jnp.stack([embeddings[stream] for stream in streams]))  # [S, B, D]
    label = mesh.replicate(label)
    factors = jnp.stack([jnp.asarray(stream_weights[name], jnp.float32) for name in streams])
    state_specs = jax.tree.map(lambda x: mesh.class_spec(x, log_prior.shape[0]), state)

    by_batch = P(None, *mesh.batch_spec(2))
    losses, gradients, state = jax.shard_map(
        functools.partial(_step_on_shard, options, row_update),
        in_specs=(
            P(None, None, None),
            P(None),
            P(None),
            state_specs,
            mesh.CLASS_VECTOR,
            mesh.CLASS_VECTOR,
        ),
        out_specs=(P(None), by_batch, state_specs),
    )(stacked, factors, label, state, log_prior, active)
    loss_of = {stream: losses[i] for i, stream in enumerate(streams)}
    gradient_of = {stream: gradients[i] for i, stream in enumerate(streams)}
    return {"total": jnp.sum(losses * factors), **loss_of}, gradient_of, state


def _step_on_shard(
    options: StreamingOptions,
    row_update: RowUpdate,
    stacked: Array,
    factors: Array,
    label: Array,
    state: RowState,
    log_prior: Array,
    active: Array | None,
) -> tuple[Array, Array, RowState]:
    """`loss_and_update` on one device: embeddings [S, B, D], weights of the streams [S]."""
    num_streams, batch, width = stacked.shape
    rows, factor = stacked.reshape(-1, width), jnp.repeat(factors / batch, batch)
    per_class, shared = mesh.split_per_class(state, log_prior.shape[0])
    shard = ShardPasses(
        options=options,
        row_update=row_update,
        active_rows=ActiveRows(log_prior.shape[0], options.num_classes, active),
        rows=rows,
        labels=jnp.tile(label, num_streams),
        factor=factor,
        scaled=(rows * factor[:, None]).astype(options.dtype),
        per_class=per_class,
        shared=shared,
        log_prior=log_prior,
    )
    log_sum, logit_sum, kept = shard.log_sum_exp_pass()
    losses = shard.mean_losses(stacked, label, state, log_sum, logit_sum)
    total = jnp.sum(losses * factors)
    gradients, state = shard.update_pass(log_sum, kept, is_finite=jnp.isfinite(total))
    gradients = gradients.reshape(stacked.shape)
    gradients = lax.psum_scatter(gradients, mesh.AXES, scatter_dimension=1, tiled=True)
    return losses, gradients, state
