"""The passes of the sharded loss over one device's rows: log-sum-exp, trust ratio, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.row_state import RowState, RowUpdate, StreamingOptions
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
from sicot_jax.parallel.array_types import Array, Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class ShardPasses:
    """One device's passes over its rows; for inside `shard_map`. Notation of `loss_and_update`.

    Attributes:
      options: static options.
      row_update: how rows are updated.
      active_rows: the rows that take part.
      rows: embeddings x_r of all streams, float32 [R, D] with R = S * B, equal on all devices.
      labels: their classes, int32 [R].
      factor: a_r, float32 [R].
      scaled: a_r x_r in the dtype of the products, [R, D].
      per_class: arrays of the state with one entry per class (`mesh.split_per_class`).
      shared: the other arrays of the state.
      log_prior: log share of each class in the training photos, float32 [n].
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

    def log_sum_exp_pass(
        self,
    ) -> tuple[Float[Array, " R"], Float[Array, " R"] | None, Shaped[Array, "n R"] | None]:
        """Runs the first pass.

        Logits that are kept in fewer bits are rounded first, for the sums too: with the log-sum-exp
        of others the probabilities of the second pass would not sum to 1.

        Returns:
          Log-sum-exp of the logits over all devices, float32 [R]; sum of this device's logits,
          float32 [R], None without smoothing; kept logits [n, R], None without `keep_logits`.
        """
        smoothing, keep_logits = self.options.smoothing, self.options.keep_logits
        active_rows, num_rows = self.active_rows, len(self.rows)

        def add_chunk(carry: Any, first: Any, size: int) -> Any:
            running, logit_sum, kept = carry
            state = self._up_to_date(self._read(self.per_class, first, size))
            logits = _rounded(self._logits(state.weights, first, size), keep_logits)
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
        stacked: Float[Array, "S B D"],
        label: Int[Array, " B"],
        state: RowState,
        log_sum: Float[Array, " R"],
        logit_sum: Float[Array, " R"] | None,
    ) -> Float[Array, " S"]:
        """Returns the mean cross-entropy of each stream.

        Args:
          stacked: embeddings of the streams, float32 [S, B, D].
          label: class ids, int32 [B].
          state: state of this device's rows.
          log_sum: log sums from `log_sum_exp_pass`, float32 [R].
          logit_sum: likewise, float32 [R].

        Returns:
          float32 [S], equal on all devices.
        """
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
        target_logit = _rounded(target_logit, options.keep_logits)
        if options.smoothing:
            mean = lax.psum(logit_sum, mesh.AXES).reshape(num_streams, batch) / options.num_classes
            target_logit = (1 - options.smoothing) * target_logit + options.smoothing * mean
        return jnp.mean(log_sum.reshape(num_streams, batch) - target_logit, -1)

    def update_pass(
        self,
        log_sum: Float[Array, " R"],
        kept: Shaped[Array, "n R"] | None,
        *,
        is_finite: Bool[Array, ""],
    ) -> tuple[Float[Array, "R D"], RowState]:
        """Runs the second pass: gradients, and at once the update of each chunk.

        Args:
          log_sum: log sums from `log_sum_exp_pass`, float32 [R].
          kept: likewise, [n, R]; None computes the logits again.
          is_finite: whether the loss is finite, bool scalar; otherwise nothing is updated.

        Returns:
          This device's part of the embeddings' gradient, float32 [R, D]; new state of its rows.
        """
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


def _rounded(logits: Array, keep_logits: DTypeLike | None) -> Array:
    if keep_logits is None:
        return logits
    # Not by a cast and back, which XLA may remove (xla_allow_excess_precision, on by default).
    kept = jnp.finfo(keep_logits)
    return lax.reduce_precision(logits, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)


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
