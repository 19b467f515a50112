"""Loss, update of the class weights and top-k, with the classes divided over all devices.

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
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
from sicot_jax.classifier.shard_passes import ShardPasses, label_logits
from sicot_jax.classifier.streaming import (
    ActiveRows,
    add_to_log_sum_exp,
    first_class_id,
    log_sum_exp_over_devices,
    logit_offset,
    loop_over_chunks,
    matmul_transposed,
    slice_rows,
    start_log_sum_exp,
    to_varying,
)
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


def log_prob_top_k(
    embedding: Float[Array, "B D"],
    weights: ClassWeights,
    label: Int[Array, " B"],
    *,
    k: int,
    num_classes: int,
    chunk: int = 16384,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Int[Array, "B {k}"], Float[Array, "B {k}"], Float[Array, " B"]]:
    """Returns the k best classes of each embedding and the log-probability of its label.

    Streaming: never an array of [B, C]. Every device runs through its rows in chunks with a running
    top-k and a running log-sum-exp; then only k candidates per device are gathered. Ties go to the
    lower class id, as in `lax.top_k`.

    Args:
      embedding: float32 [B, D].
      weights: kernel float32 [C padded, D] and bias [C padded], divided over devices by class.
      label: class ids, int32 [B]; -1 is allowed, its log-probability has no meaning.
      k: number of classes, at most `num_classes`.
      num_classes: C; rows beyond it are padding.
      chunk: classes at a time on a device; bounds the temporary memory at B * chunk numbers.
      dtype: dtype of the inputs of the products; sums are float32.

    Returns:
      Class ids int32 [B, k] and their logits float32 [B, k], best first; log-probabilities float32
      [B]; all equal on all devices.

    Raises:
      ValueError: when k is above the number of classes.
    """
    if k > num_classes:
        raise ValueError(f"top-k wants k={k} of num_classes={num_classes}; lower eval.top_k")

    def on_shard(
        embedding: Array, label: Array, weights: ClassWeights
    ) -> tuple[Array, Array, Array]:
        batch, shard_rows = embedding.shape[0], weights.kernel.shape[0]
        start = first_class_id(shard_rows)
        active_rows = ActiveRows(shard_rows, num_classes)
        keep = min(k, shard_rows)

        def add_chunk(carry: Any, first: Any, size: int) -> Any:
            values, classes, running = carry
            bias = slice_rows(weights.bias, first, size)
            offset = logit_offset(bias, None, active_rows.classes(first, size), 0.0)
            kernel = slice_rows(weights.kernel, first, size)
            logits = matmul_transposed(kernel, embedding, dtype) + offset[:, None]
            best, position = lax.top_k(logits.T, min(keep, size))
            values = jnp.concatenate([values, best], -1)
            classes = jnp.concatenate([classes, start + first + position], -1)
            values, position = lax.top_k(values, keep)
            classes = jnp.take_along_axis(classes, position, -1)
            return values, classes, add_to_log_sum_exp(running, logits)

        values = to_varying(jnp.full((batch, keep), -jnp.inf))
        classes = to_varying(jnp.zeros((batch, keep), jnp.int32))
        carry = values, classes, start_log_sum_exp(batch)
        values, classes, running = loop_over_chunks(add_chunk, carry, shard_rows, chunk)
        state = RowState(weights, opt_state=())
        label_logit = label_logits(embedding[None], label, state, weights.bias, dtype=dtype)[0]
        log_prob = label_logit - log_sum_exp_over_devices(running)
        values, classes = _gather_candidates(values), _gather_candidates(classes)
        values, position = lax.top_k(values, k)
        return jnp.take_along_axis(classes, position, -1), values, log_prob

    return jax.shard_map(
        on_shard,
        in_specs=(P(None, None), P(None), ClassWeights(mesh.CLASS_ROWS, mesh.CLASS_VECTOR)),
        out_specs=(P(None, None), P(None, None), P(None)),
    )(mesh.replicate(embedding), mesh.replicate(label), weights)


def _gather_candidates(x: Array) -> Array:
    # [B, k] of each device -> [B, devices * k], lowest class ids first.
    return lax.all_gather(x, mesh.AXES, axis=1, tiled=True, to="invarying")
