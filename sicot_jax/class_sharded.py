"""The sharded twins of `losses.py`: classifier rows divided over all devices, `losses.py` is their reference.

Across devices travel the embeddings [S * B, D], their gradient, and vectors of length S * B; nothing that grows with
the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sicot_jax import mesh as mesh_lib
from sicot_jax.losses import classifier_logits


def _shard_start(rows: int):
    """First class id of this device's rows."""
    return jax.lax.axis_index(mesh_lib.AXES) * rows


def _offset_shard(bias, log_prior, tau: float, num_classes: int):
    """`losses.class_offset` for this device's rows."""
    if tau:
        bias = bias + tau * jnp.where(jnp.isfinite(log_prior), log_prior, 0.0)
    ids = _shard_start(bias.shape[0]) + jnp.arange(bias.shape[0])
    return jnp.where(ids < num_classes, bias, -jnp.inf)


def _cross_entropy_shard(logits, label):
    """Cross-entropy of rows whose classes are spread over devices: [R, C / devices], int [R] -> [R], equal on all devices."""
    axes = mesh_lib.AXES
    highest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, -1)), axes)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - highest[:, None]), -1), axes)
    ids = _shard_start(logits.shape[-1]) + jnp.arange(logits.shape[-1])
    picked = jax.lax.psum(jnp.sum(jnp.where(ids == label[:, None], logits, 0.0), -1), axes)
    return jnp.log(total) + highest - picked


def co_training_loss(
    embeddings: Mapping[str, jax.Array],
    label,
    kernel,
    bias,
    *,
    weights: Mapping[str, float],
    log_prior=None,
    tau: float = 0.0,
    num_classes: int | None = None,
    dtype=jnp.float32,
):
    """`losses.co_training_loss` for kernel `[C, D]`, bias and log prior divided by class over all devices.

    The streams are stacked, so that one product with the kernel serves all of them.
    """
    streams = tuple(weights)
    num_classes = num_classes or kernel.shape[0]
    if log_prior is None:
        log_prior = jnp.zeros_like(bias)
    stacked = mesh_lib.replicate(jnp.stack([embeddings[stream] for stream in streams]))  # [S, B, D]
    label = mesh_lib.replicate(label)
    factors = jnp.asarray([weights[stream] for stream in streams], jnp.float32)

    def shard(stacked, label, kernel, bias, log_prior):
        rows = stacked.reshape(-1, stacked.shape[-1])
        logits = classifier_logits(rows, kernel, _offset_shard(bias, log_prior, tau, num_classes), dtype)
        losses = _cross_entropy_shard(logits, jnp.tile(label, len(streams)))
        return jnp.mean(losses.reshape(len(streams), -1), -1)

    losses = jax.shard_map(
        shard,
        in_specs=(P(None, None, None), P(None), mesh_lib.CLASS_ROWS, mesh_lib.CLASS, mesh_lib.CLASS),
        out_specs=P(None),
    )(stacked, label, kernel, bias, log_prior)
    return jnp.sum(losses * factors), {stream: losses[i] for i, stream in enumerate(streams)}


def log_prob_top_k(embedding, kernel, bias, label, *, k: int, num_classes: int, chunk: int = 16384, dtype=jnp.float32):
    """Exact top-k over classes divided over all devices, streaming: never an array of [B, C].

    Every device runs through its rows in chunks with a running top-k and a running log-sum-exp; then only k candidates
    per device meet. Ties go to the lower class id, as in `lax.top_k`.

    Args:
      embedding: [B, D]; label: int32 [B], may be -1 (its log-probability is then meaningless).
      kernel, bias: [C padded, D], [C padded] divided by class.
      k: at most the number of classes.
      chunk: classes at a time per device; bounds the temporary memory at B * chunk.

    Returns: class ids int32 [B, k], logits [B, k], log-probability of the label [B], all replicated.
    """
    if k > num_classes:
        raise ValueError(f"top-k wants k={k} of num_classes={num_classes}; lower eval.top_k")
    axes = mesh_lib.AXES

    def shard(embedding, label, kernel, bias):
        batch, shard_rows = embedding.shape[0], kernel.shape[0]
        start = _shard_start(shard_rows)
        offset = _offset_shard(bias, bias, 0.0, num_classes)
        size = min(chunk, shard_rows)
        keep = min(k, shard_rows)

        def one_chunk(first, size):
            rows = jax.lax.dynamic_slice_in_dim(kernel, first, size)
            logits = classifier_logits(embedding, rows, jax.lax.dynamic_slice_in_dim(offset, first, size), dtype)
            return logits, start + first + jnp.arange(size)

        def merge(carry, logits, ids):
            values, classes, highest, total, picked = carry
            new_highest = jnp.maximum(highest, jnp.max(logits, -1))
            finite = jnp.where(jnp.isfinite(new_highest), new_highest, 0.0)
            total = total * jnp.exp(highest - finite) + jnp.sum(jnp.exp(logits - finite[:, None]), -1)
            picked = picked + jnp.sum(jnp.where(ids == label[:, None], logits, 0.0), -1)
            best, where = jax.lax.top_k(logits, min(k, logits.shape[-1]))
            values = jnp.concatenate([values, best], -1)
            classes = jnp.concatenate([classes, ids[where]], -1)
            values, where = jax.lax.top_k(values, keep)
            return values, jnp.take_along_axis(classes, where, -1), new_highest, total, picked

        def varying(x):
            return jax.lax.pcast(x, axes, to="varying")

        carry = (
            varying(jnp.full((batch, keep), -jnp.inf)),
            varying(jnp.zeros((batch, keep), jnp.int32)),
            varying(jnp.full((batch,), -jnp.inf)),
            varying(jnp.zeros((batch,))),
            varying(jnp.zeros((batch,))),
        )
        whole = shard_rows // size
        carry, _ = jax.lax.scan(
            lambda carry, first: (merge(carry, *one_chunk(first, size)), None), carry, jnp.arange(whole) * size
        )
        if shard_rows % size:
            carry = merge(carry, *one_chunk(whole * size, shard_rows % size))
        values, classes, highest, total, picked = carry

        top = jax.lax.pmax(highest, axes)
        log_sum = jnp.log(jax.lax.psum(total * jnp.exp(highest - top), axes)) + top
        log_prob = jax.lax.psum(picked, axes) - log_sum
        values = _gather(values)
        classes = _gather(classes)
        values, where = jax.lax.top_k(values, k)
        return jnp.take_along_axis(classes, where, -1), values, log_prob

    return jax.shard_map(
        shard,
        in_specs=(P(None, None), P(None), mesh_lib.CLASS_ROWS, mesh_lib.CLASS),
        out_specs=(P(None, None), P(None, None), P(None)),
    )(mesh_lib.replicate(embedding), mesh_lib.replicate(label), kernel, bias)


def _gather(x):
    """Candidates of all devices side by side, lowest class ids first: [B, k] -> [B, devices * k]."""
    return jax.lax.all_gather(x, mesh_lib.AXES, axis=1, tiled=True, to="invarying")
