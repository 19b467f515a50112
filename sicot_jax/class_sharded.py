"""The co-training loss and the classifier's update over classes divided among all devices: exact and streaming.

Each device owns rows [C / devices, D] and runs through them in chunks, twice. First pass: a running maximum and sum of
exponentials for each embedding. Second pass: the chunk's probabilities (computed again, or from kept logits), its
gradient, and at once its update, so that no gradient of the size of the kernel ever exists. The visual and the mixed
embeddings are stacked: one product with a chunk serves both.

Across devices travel the embeddings [S * B, D], their gradient, and vectors of length S * B; nothing that grows with
the number of classes. `losses.py` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax import mesh as mesh_lib

MASKED = -1e30  # the logit of a padding class: finite, so that a shard of nothing but padding makes no inf - inf

Params = dict[str, jax.Array]  # {"kernel": [C, D], "bias": [C]}, rows divided over all devices
# (gradient of rows, optimizer state, rows) -> (new rows, new optimizer state); element by element.
Update = Callable[[Params, optax.OptState, Params], tuple[Params, optax.OptState]]


def shard_start(rows: int):
    """First class id of this device's rows."""
    return lax.axis_index(mesh_lib.AXES) * rows


def shard_offset(bias, log_prior, tau: float, num_classes: int):
    """`losses.class_offset` for this device's rows, padding at MASKED."""
    if tau:
        bias = bias + tau * log_prior
    ids = shard_start(bias.shape[0]) + jnp.arange(bias.shape[0])
    return jnp.where(ids < num_classes, bias, MASKED)


def products(rows, kernel, dtype):
    """rows @ kernel^T with inputs in `dtype` and float32 sums: [R, D], [n, D] -> [R, n]."""
    return jnp.einsum("rd,nd->rn", rows.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def cut(x, first, size: int):
    """Rows first .. first + size."""
    return lax.dynamic_slice_in_dim(x, first, size)


def put(x, part, first):
    """Rows from `first` on replaced."""
    return lax.dynamic_update_slice_in_dim(x, part, first, 0)


def over_chunks(function, carry, rows: int, chunk: int):
    """`carry = function(carry, first, size)` for all rows, `chunk` at a time: a loop, then what is left over."""
    size = min(chunk, rows)
    whole, rest = divmod(rows, size)
    carry = lax.fori_loop(0, whole, lambda i, carry: function(carry, i * size, size), carry)
    return function(carry, whole * size, rest) if rest else carry


def running_log_sum(state, logits, *, axis: int = -1):
    """One block more for a running log-sum-exp: state (maximum [R], sum of exp(logit - maximum) [R]), classes along axis."""
    highest, total = state
    new = jnp.maximum(highest, jnp.max(logits, axis))
    return new, total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - jnp.expand_dims(new, axis)), axis)


def log_sum_over_devices(state):
    """The log-sum-exp of all devices' classes from each one's running state: [R], equal on all devices."""
    highest, total = state
    top = lax.pmax(highest, mesh_lib.AXES)
    return jnp.log(lax.psum(total * jnp.exp(highest - top), mesh_lib.AXES)) + top


def varying(x):
    """A value that starts equal on all devices and then differs."""
    return lax.pcast(x, mesh_lib.AXES, to="varying")


def normal_rows(key, rows: int, *, num_classes: int, width: int, scale: float, chunk: int = 4096):
    """float32 [rows, D] divided by class: row c ~ N(0, scale^2) drawn from fold_in(key, c), zero from `num_classes` on.

    A chunk at a time: the random bits of a whole kernel would need as much memory again, twice over.
    """

    def shard(key, like):
        start = shard_start(like.shape[0])

        def draw(kernel, first, size):
            own = start + first + jnp.arange(size)
            numbers = jax.vmap(lambda c: jax.random.normal(jax.random.fold_in(key, c), (width,)))(own)
            return put(kernel, jnp.where(own[:, None] < num_classes, scale * numbers, 0.0), first)

        return over_chunks(draw, varying(jnp.zeros((like.shape[0], width))), like.shape[0], chunk)

    like = jnp.zeros(rows, out_sharding=mesh_lib.CLASS)
    return jax.shard_map(shard, in_specs=(P(), mesh_lib.CLASS), out_specs=mesh_lib.CLASS_ROWS)(key, like)


def _packed(logits, dtype):
    """Logits to be kept; 16-bit ones as integers, since XLA on CPU widens an array of bfloat16 whole to write a slice."""
    logits = logits.astype(dtype)
    return lax.bitcast_convert_type(logits, jnp.uint16) if logits.itemsize == 2 else logits


def _unpacked(kept, dtype):
    return (lax.bitcast_convert_type(kept, dtype) if kept.dtype == jnp.uint16 else kept).astype(jnp.float32)


def label_logits(rows, labels, kernel, offset, dtype):
    """The logit of each row's own class, from the device that has it: [R, D], int [R] -> [R], equal on all devices."""
    local = labels - shard_start(kernel.shape[0])
    here = (local >= 0) & (local < kernel.shape[0])
    local = jnp.where(here, local, 0)
    logits = jnp.einsum("rd,rd->r", rows.astype(dtype), kernel[local].astype(dtype), preferred_element_type=jnp.float32)
    return lax.psum(jnp.where(here, logits + offset[local], 0.0), mesh_lib.AXES)


def loss_and_update(
    embeddings: Mapping[str, jax.Array],
    label,
    params: Params,
    opt_state: optax.OptState,
    log_prior,
    *,
    weights: Mapping[str, float],
    update: Update,
    num_classes: int,
    tau: float = 0.0,
    dtype=jnp.float32,
    chunk: int = 4096,
    keep_logits: Any = None,
):
    """`losses.co_training_loss`, its gradient for the embeddings, and the updated classifier.

    For logits z_rc = x_r . w_c + offset_c of row r (one stream's embedding of one photo) and
    g_rc = softmax(z_r)_c - [c = y_r]: dL/dx_r = a_r sum_c g_rc w_c and dL/dw_c = sum_r g_rc a_r x_r, with a_r the weight
    of the stream over B. Exact: no small probability is dropped. Where the loss is not finite nothing is updated.

    Args:
      embeddings: stream -> float32 [B, D], divided by batch.
      label: int32 [B], divided by batch.
      params, opt_state, log_prior: the classifier, rows divided over all devices; to be donated.
      weights: stream -> w; only the streams named here count.
      update: applied chunk by chunk, with the optimizer state's entries of those rows.
      num_classes: rows beyond it are padding: no probability, no gradient.
      tau: logit adjustment, see `losses.class_offset`.
      dtype: of the products' inputs; sums, softmax and update are float32.
      chunk: classes at a time on a device; temporary memory is a few times chunk * (S * B + D) numbers.
      keep_logits: dtype in which all logits [S * B, C / devices] stay for the second pass; None computes them again.

    Returns: losses ("total", and each stream's mean cross-entropy), cotangents stream -> [B, D], params, opt_state.
    """
    streams = tuple(weights)
    stacked = mesh_lib.replicate(jnp.stack([embeddings[stream] for stream in streams]))  # [S, B, D]
    label = mesh_lib.replicate(label)
    factors = jnp.asarray([weights[stream] for stream in streams], jnp.float32)
    class_specs = jax.tree.map(lambda x: mesh_lib.class_spec(x, log_prior.shape[0]), (params, opt_state))

    def shard(stacked, label, state, log_prior):
        num_streams, batch, width = stacked.shape
        shard_rows = log_prior.shape[0]
        rows = stacked.reshape(-1, width)  # [R, D], R = S * B
        labels = jnp.tile(label, num_streams)
        kernel, bias = state[0]["kernel"], state[0]["bias"]
        offset = shard_offset(bias, log_prior, tau, num_classes)

        def sum_chunk(carry, first, size):
            sums, kept = carry
            logits = products(cut(kernel, first, size), rows, dtype) + cut(offset, first, size)[:, None]  # [n, R]
            if kept is not None:
                kept = put(kept, _packed(logits, keep_logits), first)
            return running_log_sum(sums, logits, axis=0), kept

        sums = varying(jnp.full(len(rows), MASKED)), varying(jnp.zeros(len(rows)))
        kept = None
        if keep_logits is not None:
            kept = varying(_packed(jnp.zeros((shard_rows, len(rows))), keep_logits))
        sums, kept = over_chunks(sum_chunk, (sums, kept), shard_rows, chunk)
        log_sum = log_sum_over_devices(sums)
        losses = log_sum - label_logits(rows, labels, kernel, offset, dtype)
        losses = jnp.mean(losses.reshape(num_streams, batch), -1)
        total = jnp.sum(losses * factors)

        factor = jnp.repeat(factors / batch, batch)  # a_r
        scaled = (rows * factor[:, None]).astype(dtype)
        start = shard_start(shard_rows)
        per_class, shared = mesh_lib.split_per_class(state, shard_rows)

        def update_chunk(carry, first, size):
            per_class, new_shared, cotangent = carry
            old = mesh_lib.join_per_class(jax.tree.map(lambda x: cut(x, first, size), per_class), shared)
            params, opt_state = old
            rows_of_kernel = params["kernel"].astype(dtype)
            if kept is None:
                logits = products(rows_of_kernel, rows, dtype) + cut(offset, first, size)[:, None]
            else:
                logits = _unpacked(cut(kept, first, size), keep_logits)
            ids = start + first + jnp.arange(size)
            pull = jnp.exp(logits - log_sum) - (ids[:, None] == labels)  # [n, R]
            narrow = pull.astype(dtype)
            cotangent += jnp.einsum("nr,nd->rd", narrow, rows_of_kernel, preferred_element_type=jnp.float32)
            gradient = {
                "kernel": jnp.einsum("nr,rd->nd", narrow, scaled, preferred_element_type=jnp.float32),
                "bias": jnp.sum(pull * factor, 1),
            }
            # The branch is more than a guard: without it XLA fuses the reads of one array with the writes of another and
            # then copies both whole for every chunk (CPU, jax 0.10: 20 x the time).
            new = lax.cond(jnp.isfinite(total), lambda: update(gradient, opt_state, params), lambda: old)
            new, new_shared = mesh_lib.split_per_class(new, size)
            per_class = jax.tree.map(lambda x, part: put(x, part, first), per_class, new)
            return per_class, new_shared, cotangent

        carry = per_class, shared, varying(jnp.zeros_like(rows))
        per_class, shared, cotangent = over_chunks(update_chunk, carry, shard_rows, chunk)
        cotangent = (cotangent * factor[:, None]).reshape(stacked.shape)
        cotangent = lax.psum_scatter(cotangent, mesh_lib.AXES, scatter_dimension=1, tiled=True)
        return losses, cotangent, mesh_lib.join_per_class(per_class, shared)

    by_batch = P(None, *mesh_lib.batch_spec(2))
    losses, cotangents, (params, opt_state) = jax.shard_map(
        shard,
        in_specs=(P(None, None, None), P(None), class_specs, mesh_lib.CLASS),
        out_specs=(P(None), by_batch, class_specs),
    )(stacked, label, (params, opt_state), log_prior)
    by_stream = {stream: losses[i] for i, stream in enumerate(streams)}
    cotangent_of = {stream: cotangents[i] for i, stream in enumerate(streams)}
    return {"total": jnp.sum(losses * factors), **by_stream}, cotangent_of, params, opt_state


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

    def shard(embedding, label, kernel, bias):
        batch, shard_rows = embedding.shape[0], kernel.shape[0]
        offset = shard_offset(bias, bias, 0.0, num_classes)
        start = shard_start(shard_rows)
        keep = min(k, shard_rows)

        def add_chunk(carry, first, size):
            values, classes, sums = carry
            logits = products(embedding, cut(kernel, first, size), dtype) + cut(offset, first, size)
            best, where = lax.top_k(logits, min(keep, size))
            values = jnp.concatenate([values, best], -1)
            classes = jnp.concatenate([classes, start + first + where], -1)
            values, where = lax.top_k(values, keep)
            return values, jnp.take_along_axis(classes, where, -1), running_log_sum(sums, logits)

        values = varying(jnp.full((batch, keep), -jnp.inf))
        classes = varying(jnp.zeros((batch, keep), jnp.int32))
        sums = varying(jnp.full(batch, MASKED)), varying(jnp.zeros(batch))
        values, classes, sums = over_chunks(add_chunk, (values, classes, sums), shard_rows, chunk)
        log_prob = label_logits(embedding, label, kernel, offset, dtype) - log_sum_over_devices(sums)
        values = _gather(values)
        classes = _gather(classes)
        values, where = lax.top_k(values, k)
        return jnp.take_along_axis(classes, where, -1), values, log_prob

    return jax.shard_map(
        shard,
        in_specs=(P(None, None), P(None), mesh_lib.CLASS_ROWS, mesh_lib.CLASS),
        out_specs=(P(None, None), P(None, None), P(None)),
    )(mesh_lib.replicate(embedding), mesh_lib.replicate(label), kernel, bias)


def _gather(x):
    """Candidates of all devices side by side, lowest class ids first: [B, k] -> [B, devices * k]."""
    return lax.all_gather(x, mesh_lib.AXES, axis=1, tiled=True, to="invarying")
