"""Exact top-k predictions over classes divided over all devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sicot_jax.classifier.class_weights import ClassWeights
from sicot_jax.classifier.row_state import RowState
from sicot_jax.classifier.shard_passes import label_logits
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
