"""The co-training loss and the classifier's update over classes divided among all devices,
streaming.

Each device owns rows [C / devices, D] and runs through them (or through those that take part) in
chunks, twice. First
pass: a running maximum and sum of exponentials for each embedding. Second pass: the chunk's
  probabilities (computed again, or from kept logits), its gradient, and at once its update, so that
  no gradient of the size of the kernel ever exists. Visual and mixed embeddings are stacked: one
  product with a chunk serves both. An optimizer that wants norms of the whole gradient (LARS) costs
  a pass between the two: logits and gradient of each chunk once more, for two sums.

Across devices travel the embeddings [S * B, D], their gradient, and vectors of length S * B;
nothing that grows with the number of classes. `losses.py` is the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.parallel import mesh as mesh_lib

MASKED = (
    -1e30
)  # the logit of a padding class: finite, so that a shard of nothing but padding makes no inf - inf

# The classifier's trained arrays, {"kernel": [C, D], "bias": [C], "opt_state": ...}, rows divided
# over all devices; a sampled head keeps more there.
State = dict[str, Any]
Update = Callable[
    ..., State
]  # (gradient of kernel and bias, state) of some rows [, trust_ratio=scalar] -> new state


def shard_start(rows: int):
    """First class id of this device's rows."""
    return lax.axis_index(mesh_lib.AXES) * rows


def products(kernel, rows, dtype):
    """kernel @ rows^T with inputs in `dtype` and float32 sums: [n, D], [R, D] -> [n, R]."""
    return jnp.einsum(
        "nd,rd->nr", kernel.astype(dtype), rows.astype(dtype), preferred_element_type=jnp.float32
    )


def cut(x, first, size: int):
    """Rows first .. first + size."""
    return lax.dynamic_slice_in_dim(x, first, size)


def put(x, part, first):
    """Rows from `first` on replaced."""
    return lax.dynamic_update_slice_in_dim(x, part, first, 0)


def over_chunks(function, carry, rows: int, chunk: int):
    """`carry = function(carry, first, size)` for all rows, `chunk` at a time: a loop, then what is
    left over.
    """
    size = min(chunk, rows)
    whole, rest = divmod(rows, size)
    carry = lax.fori_loop(0, whole, lambda i, carry: function(carry, i * size, size), carry)
    return function(carry, whole * size, rest) if rest else carry


def varying(x):
    """A value that starts equal on all devices and then differs."""
    return lax.pcast(x, mesh_lib.AXES, to="varying")


def running_log_sum(state, logits):
    """One chunk more for a running log-sum-exp: state (maximum [R], sum of exp(logit - maximum)
    [R]), logits [n, R].
    """
    highest, total = state
    new = jnp.maximum(highest, jnp.max(logits, 0))
    return new, total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new), 0)


def start_log_sum(rows: int):
    return varying(jnp.full(rows, MASKED)), varying(jnp.zeros(rows))


def log_sum_over_devices(state):
    """The log-sum-exp of all devices' classes from each one's running state: [R], equal on all
    devices.
    """
    highest, total = state
    top = lax.pmax(highest, mesh_lib.AXES)
    return jnp.log(lax.psum(total * jnp.exp(highest - top), mesh_lib.AXES)) + top


@dataclasses.dataclass(frozen=True)
class Taking:
    """The rows of a device that take part: all in order, or those at `active` (int32 [A], -1 for an
    empty slot).
    """

    shard_rows: int
    num_classes: int
    active: jax.Array | None = None

    @property
    def count(self) -> int:
        return self.shard_rows if self.active is None else len(self.active)

    def _places(self, first, size: int):
        return first + jnp.arange(size) if self.active is None else cut(self.active, first, size)

    def classes(self, first, size: int):
        """Class ids of a chunk; -1 for an empty slot and for padding."""
        places = self._places(first, size)
        ids = shard_start(self.shard_rows) + places
        return jnp.where((places >= 0) & (ids < self.num_classes), ids, -1)

    def read(self, tree, first, size: int):
        """A chunk of arrays with one entry a class."""
        if self.active is None:
            return jax.tree.map(lambda x: cut(x, first, size), tree)
        places = jnp.maximum(self._places(first, size), 0)
        return jax.tree.map(lambda x: x.at[places].get(mode="promise_in_bounds"), tree)

    def write(self, tree, part, first, size: int):
        """The arrays with a chunk replaced; what belongs to an empty slot goes nowhere."""
        if self.active is None:
            return jax.tree.map(lambda x, new: put(x, new, first), tree, part)
        places = self._places(first, size)
        places = jnp.where(
            places < 0, self.shard_rows + jnp.arange(size), places
        )  # out of bounds, and each once
        return jax.tree.map(
            lambda x, new: x.at[places].set(new, mode="drop", unique_indices=True), tree, part
        )


def offset(bias, log_prior, classes, tau: float):
    """`losses.class_offset` of a chunk [n]: bias + tau * log prior, MASKED where there is no class."""
    return jnp.where(classes >= 0, bias + tau * log_prior if tau else bias, MASKED)


def _packed(logits, dtype):
    """Logits to be kept; 16-bit ones as integers, since XLA on CPU widens an array of bfloat16
    whole to write a slice.
    """
    logits = logits.astype(dtype)
    return lax.bitcast_convert_type(logits, jnp.uint16) if logits.itemsize == 2 else logits


def _unpacked(kept, dtype):
    return (lax.bitcast_convert_type(kept, dtype) if kept.dtype == jnp.uint16 else kept).astype(
        jnp.float32
    )


def normal_rows(key, rows: int, *, num_classes: int, width: int, scale: float, chunk: int = 4096):
    """float32 [rows, D] divided by class: row c ~ N(0, scale^2) drawn from fold_in(key, c), zero
    from `num_classes` on.

    A chunk at a time: the random bits of a whole kernel would need as much memory again, twice
      over.
    """

    def shard(key, like):
        start = shard_start(like.shape[0])

        def draw(kernel, first, size):
            own = start + first + jnp.arange(size)
            numbers = jax.vmap(lambda c: jax.random.normal(jax.random.fold_in(key, c), (width,)))(
                own
            )
            return put(kernel, jnp.where(own[:, None] < num_classes, scale * numbers, 0.0), first)

        return over_chunks(draw, varying(jnp.zeros((like.shape[0], width))), like.shape[0], chunk)

    like = jnp.zeros(rows, out_sharding=mesh_lib.CLASS)
    return jax.shard_map(shard, in_specs=(P(), mesh_lib.CLASS), out_specs=mesh_lib.CLASS_ROWS)(
        key, like
    )


def loss_and_update(
    embeddings: Mapping[str, jax.Array],
    label,
    state: State,
    log_prior,
    *,
    weights: Mapping[str, Any],
    update: Update,
    num_classes: int,
    tau: float = 0.0,
    smoothing: float = 0.0,
    dtype=jnp.float32,
    chunk: int = 4096,
    keep_logits: Any = None,
    active=None,
    fresh: Callable[[State], State] = lambda state: state,
    trust_ratio: TrustRatio | None = None,
):
    """`losses.co_training_loss`, its gradient for the embeddings, and the updated classifier.

    For logits z_rc = x_r . w_c + offset_c of row r (one stream's embedding of one photo) and g_rc =
    softmax(z_r)_c - q_rc with the target q_rc = (1 - smoothing) [c = y_r] + smoothing / C: dL/dx_r
    = a_r sum_c g_rc w_c and dL/dw_c = sum_r g_rc a_r x_r, with a_r the weight of the stream over B.
    Over all classes, exactly (no small probability is dropped), or over the active ones. Where the
    loss is not finite nothing is updated.

    Args:
      embeddings: stream -> float32 [B, D], divided by batch, or on all devices already.
      label: int32 [B], divided by batch.
      state, log_prior: the classifier, rows divided over all devices; the state is to be donated.
      weights: stream -> w, numbers or scalars that all devices have; only the streams named here
        count.
      update: applied chunk by chunk to the state's entries of those rows.
      num_classes: rows beyond it are padding: no probability, no gradient.
      tau: logit adjustment, see `losses.class_offset`; smoothing: see `losses.cross_entropy`; over
        all classes alone.
      dtype: of the products' inputs; sums, softmax and update are float32.
      chunk: classes at a time on a device; temporary memory is a few times chunk * (S * B + D)
        numbers.
      keep_logits: dtype in which all logits [C / devices, S * B] stay for the second pass; None
        computes them again.
      active: int32 [devices * A], divided: places (in its own rows) of the classes that a device
        takes, -1 for none.
        The labels' classes must be among them, and none twice.
      fresh: brings rows up to date before they are used.
      trust_ratio: of LARS, of the whole kernel: found in a pass of its own, and given to `update`
        as `trust_ratio`. Two
        products more, or one with `keep_logits`; across devices goes one vector of two numbers.

    Returns: losses ("total", and each stream's mean cross-entropy), cotangents stream -> [B, D],
      new state.
    """
    streams = tuple(weights)
    stacked = mesh_lib.replicate(jnp.stack([embeddings[stream] for stream in streams]))  # [S, B, D]
    label = mesh_lib.replicate(label)
    factors = jnp.stack([jnp.asarray(weights[stream], jnp.float32) for stream in streams])
    state_specs = jax.tree.map(lambda x: mesh_lib.class_spec(x, log_prior.shape[0]), state)

    def shard(stacked, factors, label, state, log_prior, active):
        num_streams, batch, width = stacked.shape
        shard_rows = log_prior.shape[0]
        taking = Taking(shard_rows, num_classes, active)
        rows = stacked.reshape(-1, width)  # [R, D], R = S * B
        labels = jnp.tile(label, num_streams)
        per_class, shared = mesh_lib.split_per_class(state, shard_rows)

        def logits_of(part, first, size):
            classes = taking.classes(first, size)
            added = offset(part["bias"], taking.read(log_prior, first, size), classes, tau)
            return products(part["kernel"], rows, dtype) + added[:, None]  # [n, R]

        def sum_chunk(carry, first, size):
            sums, logit_sum, kept = carry
            part = fresh(mesh_lib.join_per_class(taking.read(per_class, first, size), shared))
            logits = logits_of(part, first, size)
            if kept is not None:
                kept = put(kept, _packed(logits, keep_logits), first)
            if smoothing:
                logit_sum += jnp.sum(
                    jnp.where(taking.classes(first, size)[:, None] >= 0, logits, 0.0), 0
                )
            return running_log_sum(sums, logits), logit_sum, kept

        kept = None
        if keep_logits is not None:
            kept = varying(_packed(jnp.zeros((taking.count, len(rows))), keep_logits))
        carry = start_log_sum(len(rows)), varying(jnp.zeros(len(rows))) if smoothing else None, kept
        sums, logit_sum, kept = over_chunks(sum_chunk, carry, taking.count, chunk)
        log_sum = log_sum_over_devices(sums)
        own = label_logits(stacked, label, state, log_prior, tau=tau, dtype=dtype, fresh=fresh)
        if smoothing:
            mean = lax.psum(logit_sum, mesh_lib.AXES).reshape(num_streams, batch) / num_classes
            own = (1 - smoothing) * own + smoothing * mean
        losses = jnp.mean(log_sum.reshape(num_streams, batch) - own, -1)
        total = jnp.sum(losses * factors)

        factor = jnp.repeat(factors / batch, batch)  # a_r
        scaled = (rows * factor[:, None]).astype(dtype)

        def pull_of(part, first, size):
            """g_rc of a chunk: [n, R]."""
            logits = (
                logits_of(part, first, size)
                if kept is None
                else _unpacked(cut(kept, first, size), keep_logits)
            )
            classes = taking.classes(first, size)[:, None]
            target = (1 - smoothing) * (classes == labels)
            if smoothing:
                target += smoothing / num_classes * (classes >= 0)
            return jnp.exp(logits - log_sum) - target

        def kernel_gradient(narrow):
            return jnp.einsum("nr,rd->nd", narrow, scaled, preferred_element_type=jnp.float32)

        def ratio_of(trust_ratio: TrustRatio):
            def add_squares(squares, first, size):
                part = fresh(mesh_lib.join_per_class(taking.read(per_class, first, size), shared))
                gradient = kernel_gradient(pull_of(part, first, size).astype(dtype))
                return squares + trust_ratio.squares(gradient, part["kernel"])

            squares = over_chunks(add_squares, varying(jnp.zeros(2)), taking.count, chunk)
            return trust_ratio.of(lax.psum(squares, mesh_lib.AXES))

        scaling = {"trust_ratio": ratio_of(trust_ratio)} if trust_ratio else {}

        def update_chunk(carry, first, size):
            per_class, new_shared, cotangent = carry
            stale = mesh_lib.join_per_class(taking.read(per_class, first, size), shared)
            part = fresh(stale)
            pull = pull_of(part, first, size)
            narrow = pull.astype(dtype)
            cotangent += jnp.einsum(
                "nr,nd->rd",
                narrow,
                part["kernel"].astype(dtype),
                preferred_element_type=jnp.float32,
            )
            gradient = {
                "kernel": kernel_gradient(narrow),
                "bias": jnp.sum(pull * factor, 1),
            }
            # The branch is more than a guard: without it XLA fuses the reads of one array with the
            # writes of another and then copies both whole for every chunk (CPU, jax 0.10: 20 x the
            # time).
            new = lax.cond(
                jnp.isfinite(total), lambda: update(gradient, part, **scaling), lambda: stale
            )
            new, new_shared = mesh_lib.split_per_class(new, size)
            return taking.write(per_class, new, first, size), new_shared, cotangent

        carry = per_class, shared, varying(jnp.zeros_like(rows))
        per_class, shared, cotangent = over_chunks(update_chunk, carry, taking.count, chunk)
        cotangent = (cotangent * factor[:, None]).reshape(stacked.shape)
        cotangent = lax.psum_scatter(cotangent, mesh_lib.AXES, scatter_dimension=1, tiled=True)
        return losses, cotangent, mesh_lib.join_per_class(per_class, shared)

    by_batch = P(None, *mesh_lib.batch_spec(2))
    losses, cotangents, state = jax.shard_map(
        shard,
        in_specs=(
            P(None, None, None),
            P(None),
            P(None),
            state_specs,
            mesh_lib.CLASS,
            mesh_lib.CLASS,
        ),
        out_specs=(P(None), by_batch, state_specs),
    )(stacked, factors, label, state, log_prior, active)
    by_stream = {stream: losses[i] for i, stream in enumerate(streams)}
    cotangent_of = {stream: cotangents[i] for i, stream in enumerate(streams)}
    return {"total": jnp.sum(losses * factors), **by_stream}, cotangent_of, state


def label_logits(
    stacked, label, state: State, log_prior, *, tau: float = 0.0, dtype, fresh=lambda state: state
):
    """Each row's logit of its own class, from the device that has it: [S, B, D], int [B] -> [S, B],
    equal on all devices.
    """
    shard_rows = log_prior.shape[0]
    local = label - shard_start(shard_rows)
    here = (local >= 0) & (local < shard_rows)
    taking = Taking(shard_rows, shard_rows, jnp.where(here, local, 0))
    per_class, shared = mesh_lib.split_per_class(state, shard_rows)
    own = fresh(mesh_lib.join_per_class(taking.read(per_class, 0, len(label)), shared))
    logits = jnp.einsum(
        "sbd,bd->sb",
        stacked.astype(dtype),
        own["kernel"].astype(dtype),
        preferred_element_type=jnp.float32,
    )
    added = offset(own["bias"], taking.read(log_prior, 0, len(label)), label, tau)
    return lax.psum(jnp.where(here, logits + added, 0.0), mesh_lib.AXES)


def log_prob_top_k(
    embedding,
    kernel,
    bias,
    label,
    *,
    k: int,
    num_classes: int,
    chunk: int = 16384,
    dtype=jnp.float32,
):
    """Exact top-k over classes divided over all devices, streaming: never an array of [B, C].

    Every device runs through its rows in chunks with a running top-k and a running log-sum-exp;
    then only k candidates per device meet. Ties go to the lower class id, as in `lax.top_k`.

    Args:
      embedding: [B, D]; label: int32 [B], may be -1 (its log-probability is then meaningless).
      kernel, bias: [C padded, D], [C padded] divided by class.
      k: at most the number of classes.
      chunk: classes at a time per device; bounds the temporary memory at B * chunk.

    Returns: class ids int32 [B, k], logits [B, k], log-probability of the label [B], all
      replicated.
    """
    if k > num_classes:
        raise ValueError(f"top-k wants k={k} of num_classes={num_classes}; lower eval.top_k")

    def shard(embedding, label, kernel, bias):
        batch, shard_rows = embedding.shape[0], kernel.shape[0]
        start = shard_start(shard_rows)
        taking = Taking(shard_rows, num_classes)
        keep = min(k, shard_rows)

        def add_chunk(carry, first, size):
            values, classes, sums = carry
            added = offset(cut(bias, first, size), None, taking.classes(first, size), 0.0)
            logits = products(cut(kernel, first, size), embedding, dtype) + added[:, None]
            best, where = lax.top_k(logits.T, min(keep, size))
            values = jnp.concatenate([values, best], -1)
            classes = jnp.concatenate([classes, start + first + where], -1)
            values, where = lax.top_k(values, keep)
            return values, jnp.take_along_axis(classes, where, -1), running_log_sum(sums, logits)

        values = varying(jnp.full((batch, keep), -jnp.inf))
        classes = varying(jnp.zeros((batch, keep), jnp.int32))
        carry = values, classes, start_log_sum(batch)
        values, classes, sums = over_chunks(add_chunk, carry, shard_rows, chunk)
        own = label_logits(
            embedding[None], label, {"kernel": kernel, "bias": bias}, bias, dtype=dtype
        )[0]
        log_prob = own - log_sum_over_devices(sums)
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


def take_rows(rows, index):
    """rows[index], zeros where index is -1; both divided over all devices by their leading axis,
    and so is what comes back.

    Args: rows [C, D]; index int32 [N].
    Returns: [N, D]. The rows go round the devices, each of which takes its own: it holds two
      devices' at a time.
    """

    def shard(rows, index):
        devices = lax.axis_size(mesh_lib.AXES)
        first = lax.axis_index(mesh_lib.AXES)

        def turn(i, carry):
            taken, rows = carry
            place = index - (first + i) % devices * len(rows)
            here = (place >= 0) & (place < len(rows)) & (index >= 0)
            taken = jnp.where(here[:, None], rows[jnp.clip(place, 0, len(rows) - 1)], taken)
            return taken, lax.ppermute(
                rows, mesh_lib.AXES, [(d, (d - 1) % devices) for d in range(devices)]
            )

        return lax.fori_loop(
            0, devices, turn, (varying(jnp.zeros((len(index), rows.shape[1]), rows.dtype)), rows)
        )[0]

    return jax.shard_map(
        shard, in_specs=(mesh_lib.CLASS_ROWS, mesh_lib.CLASS), out_specs=mesh_lib.CLASS_ROWS
    )(rows, index)
