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

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.losses import LossOptions
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
    update_rows,
)
from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.parallel import mesh
from sicot_jax.parallel.array_types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What the update of a chunk of rows reads and writes.

    Arrays with one entry per class are cut to the chunk, the others are complete.

    Attributes:
      weights: kernel float32 [n, D], bias float32 [n].
      opt_state: optimizer state of the weights.
      learning_rate: factor of the schedule, float32 scalar.
      step: updates done, int32 scalar; None where rows never miss a step.
      last_update: step up to which each row is up to date, int32 [n]; None likewise.
    """

    weights: ClassWeights
    opt_state: Any
    learning_rate: Any = None
    step: Any = None
    last_update: Any = None


@dataclasses.dataclass(frozen=True)
class StreamingOptions(LossOptions):
    """Options of the streaming loss; label smoothing is not for active rows.

    Attributes:
      chunk: classes at a time on a device; temporary memory is a few times chunk * (S * B + D)
        numbers.
      keep_logits: dtype in which all logits [C / devices, S * B] are kept for the second pass; None
        computes them again.
    """

    chunk: int = 4096
    keep_logits: DTypeLike | None = None


@dataclasses.dataclass(frozen=True)
class RowUpdate:
    """How a chunk of rows is updated.

    Attributes:
      apply: (gradient, state of the rows[, trust_ratio=scalar]) -> new state of the rows.
      bring_up_to_date: applies to the state of rows what they missed, before they are used; None
        where rows never miss a step.
      trust_ratio: of an optimizer that scales by the norms of the complete kernel (LARS): costs a
        pass of its own (two products more, or one with kept logits), and is given to `apply`.
    """

    apply: Callable[..., RowState]
    bring_up_to_date: Callable[[RowState], RowState] | None = None
    trust_ratio: TrustRatio | None = None


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
    """Returns `losses.co_training_loss`, its gradient for the embeddings, and new class weights.

    For logits z_rc = x_r . w_c + offset_c of row r (one stream's embedding of one photo) and g_rc =
    softmax(z_r)_c - q_rc with the target q_rc = (1 - smoothing) [c = y_r] + smoothing / C: dL/dx_r
    = a_r sum_c g_rc w_c and dL/dw_c = sum_r g_rc a_r x_r, with a_r the weight of the stream over B.
    Over all classes, exactly (no small probability is dropped), or over the active ones. Where the
    loss is not finite nothing is updated.

    Args:
      embeddings: stream -> float32 [B, D], divided by batch, or equal on all devices.
      label: class ids, int32 [B], divided by batch.
      state: of the classifier, rows divided over all devices; to be donated.
      log_prior: log share of each class in the training photos, float32 [C], divided by class.
      stream_weights: stream -> weight, numbers or scalars that all devices have; only the streams
        named here count.
      options: static options.
      row_update: how rows are updated.
      active: row indices (in a device's own rows) of the classes that take part, -1 for an empty
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
    shard = _Shard(
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


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One device's part of a step: the embeddings of the batch and the state of its rows.

    rows: embeddings of all streams, [R, D] with R = S * B. labels: their classes, [R]. factor: a_r,
    [R]. scaled: a_r x_r in the dtype of the products. per_class, shared: the state, split.
    """

    options: StreamingOptions
    row_update: RowUpdate
    active_rows: ActiveRows
    rows: Array
    labels: Array
    factor: Array
    scaled: Array
    per_class: Any
    shared: Any
    log_prior: Array

    def log_sum_exp_pass(self) -> tuple[Array, Array | None, Array | None]:
        """Log-sum-exp over all devices [R], sum of this device's logits [R], kept logits [n, R].

        The sum is None without smoothing, the logits without `keep_logits`.
        """
        smoothing, keep_logits = self.options.smoothing, self.options.keep_logits
        active_rows, num_rows = self.active_rows, len(self.rows)

        def add_chunk(carry: Any, first: Any, size: int) -> Any:
            running, logit_sum, kept = carry
            state = self._up_to_date(self._read(self.per_class, first, size))
            logits = self._logits(state.weights, first, size)
            if kept is not None:
                kept = update_rows(kept, _pack(logits, keep_logits), first)
            if smoothing:
                is_class = active_rows.classes(first, size)[:, None] >= 0
                logit_sum += jnp.sum(jnp.where(is_class, logits, 0.0), 0)
            return add_to_log_sum_exp(running, logits), logit_sum, kept

        kept = None
        if keep_logits is not None:
            kept = to_varying(_pack(jnp.zeros((active_rows.count, num_rows)), keep_logits))
        logit_sum = to_varying(jnp.zeros(num_rows)) if smoothing else None
        carry = start_log_sum_exp(num_rows), logit_sum, kept
        running, logit_sum, kept = loop_over_chunks(
            add_chunk, carry, active_rows.count, self.options.chunk
        )
        return log_sum_exp_over_devices(running), logit_sum, kept

    def mean_losses(
        self,
        stacked: Array,
        label: Array,
        state: RowState,
        log_sum: Array,
        logit_sum: Array | None,
    ) -> Array:
        """Mean cross-entropy of each stream, [S]."""
        options, (num_streams, batch, _) = self.options, stacked.shape
        target_logit = label_logits(
            stacked,
            label,
            state,
            self.log_prior,
            tau=options.tau,
            dtype=options.dtype,
            bring_up_to_date=self._up_to_date,
        )
        if options.smoothing:
            mean = lax.psum(logit_sum, mesh.AXES).reshape(num_streams, batch) / options.num_classes
            target_logit = (1 - options.smoothing) * target_logit + options.smoothing * mean
        return jnp.mean(log_sum.reshape(num_streams, batch) - target_logit, -1)

    def update_pass(
        self, log_sum: Array, kept: Array | None, *, is_finite: Array
    ) -> tuple[Array, RowState]:
        """This device's part of the embeddings' gradient, [R, D], and the new state of its rows."""
        extra = {}
        if self.row_update.trust_ratio is not None:
            extra["trust_ratio"] = self._trust_ratio(self.row_update.trust_ratio, log_sum, kept)

        def update_chunk(carry: Any, first: Any, size: int) -> Any:
            per_class, new_shared, row_gradient = carry
            stored = self._read(per_class, first, size)
            state = self._up_to_date(stored)
            logit_gradient = self._logit_gradient(state.weights, log_sum, kept, first, size)
            narrow = logit_gradient.astype(self.options.dtype)
            row_gradient += jnp.einsum(
                "nr,nd->rd",
                narrow,
                state.weights.kernel.astype(self.options.dtype),
                preferred_element_type=jnp.float32,
            )
            gradient = ClassWeights(
                self._kernel_gradient(narrow), jnp.sum(logit_gradient * self.factor, 1)
            )
            # The branch is more than a guard: without it XLA fuses the reads of one array with the
            # writes of another and then copies both completely for every chunk (CPU, jax 0.10: 20 x
            # the time).
            new = lax.cond(
                is_finite, lambda: self.row_update.apply(gradient, state, **extra), lambda: stored
            )
            new, new_shared = mesh.split_per_class(new, size)
            return self.active_rows.write(per_class, new, first, size), new_shared, row_gradient

        carry = self.per_class, self.shared, to_varying(jnp.zeros_like(self.rows))
        per_class, shared, row_gradient = loop_over_chunks(
            update_chunk, carry, self.active_rows.count, self.options.chunk
        )
        return row_gradient * self.factor[:, None], mesh.join_per_class(per_class, shared)

    def _trust_ratio(self, trust_ratio: TrustRatio, log_sum: Array, kept: Array | None) -> Array:
        def add_squares(squares: Array, first: Any, size: int) -> Array:
            weights = self._up_to_date(self._read(self.per_class, first, size)).weights
            logit_gradient = self._logit_gradient(weights, log_sum, kept, first, size)
            gradient = self._kernel_gradient(logit_gradient.astype(self.options.dtype))
            return squares + trust_ratio.squared_norms(gradient, weights.kernel)

        squares = loop_over_chunks(
            add_squares, to_varying(jnp.zeros(2)), self.active_rows.count, self.options.chunk
        )
        return trust_ratio.from_squared_norms(lax.psum(squares, mesh.AXES))

    def _read(self, per_class: Any, first: Any, size: int) -> RowState:
        return mesh.join_per_class(self.active_rows.read(per_class, first, size), self.shared)

    def _up_to_date(self, state: RowState) -> RowState:
        bring_up_to_date = self.row_update.bring_up_to_date
        return state if bring_up_to_date is None else bring_up_to_date(state)

    def _logits(self, weights: ClassWeights, first: Any, size: int) -> Array:
        """Logits [n, R] of a chunk of classes."""
        classes = self.active_rows.classes(first, size)
        log_prior = self.active_rows.read(self.log_prior, first, size)
        offset = logit_offset(weights.bias, log_prior, classes, self.options.tau)
        return matmul_transposed(weights.kernel, self.rows, self.options.dtype) + offset[:, None]

    def _logit_gradient(
        self, weights: ClassWeights, log_sum: Array, kept: Array | None, first: Any, size: int
    ) -> Array:
        """g_rc of a chunk of classes, [n, R]."""
        options = self.options
        if kept is None:
            logits = self._logits(weights, first, size)
        else:
            logits = _unpack(slice_rows(kept, first, size), options.keep_logits)
        classes = self.active_rows.classes(first, size)[:, None]
        target = (1 - options.smoothing) * (classes == self.labels)
        if options.smoothing:
            target += options.smoothing / options.num_classes * (classes >= 0)
        return jnp.exp(logits - log_sum) - target

    def _kernel_gradient(self, narrow: Array) -> Array:
        # Of a chunk's g in the dtype of the products: [n, R] -> [n, D].
        return jnp.einsum("nr,rd->nd", narrow, self.scaled, preferred_element_type=jnp.float32)


def label_logits(
    stacked: Float[Array, "S B D"],
    label: Int[Array, " B"],
    state: RowState,
    log_prior: Float[Array, " n"],
    *,
    tau: float = 0.0,
    dtype: DTypeLike,
    bring_up_to_date: Callable[[RowState], RowState] = lambda state: state,
) -> Float[Array, "S B"]:
    """Returns each embedding's logit of its label, from the device that has the class.

    For inside `shard_map`.

    Args:
      stacked: embeddings of the streams, float32 [S, B, D], equal on all devices.
      label: class ids, int32 [B], equal on all devices.
      state: state of this device's rows.
      log_prior: log share of each of its classes, float32 [n]; not read at tau 0.
      tau: strength of the logit adjustment.
      dtype: dtype of the inputs of the products.
      bring_up_to_date: applied to the state of the labels' rows before they are used.

    Returns:
      float32 [S, B], equal on all devices; 0 for a label that no device has.
    """
    shard_rows, batch = log_prior.shape[0], len(label)
    local = label - first_class_id(shard_rows)
    is_here = (local >= 0) & (local < shard_rows)
    rows = ActiveRows(shard_rows, shard_rows, jnp.where(is_here, local, 0))
    per_class, shared = mesh.split_per_class(state, shard_rows)
    state = bring_up_to_date(mesh.join_per_class(rows.read(per_class, 0, batch), shared))
    logits = jnp.einsum(
        "sbd,bd->sb",
        stacked.astype(dtype),
        state.weights.kernel.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    offset = logit_offset(state.weights.bias, rows.read(log_prior, 0, batch), label, tau)
    return lax.psum(jnp.where(is_here, logits + offset, 0.0), mesh.AXES)


def _pack(logits: Array, dtype: DTypeLike | None) -> Array:
    # 16-bit logits are kept as integers: XLA on CPU widens a complete array of bfloat16 to write a
    # slice of it.
    logits = logits.astype(dtype)
    return lax.bitcast_convert_type(logits, jnp.uint16) if logits.itemsize == 2 else logits


def _unpack(kept: Array, dtype: DTypeLike | None) -> Array:
    if kept.dtype == jnp.uint16:
        assert dtype is not None
        kept = lax.bitcast_convert_type(kept, dtype)
    return kept.astype(jnp.float32)
