"""The classifier's state and the heads: (embeddings, label, classifier) -> (losses, embedding
cotangents, new classifier).

A head owns loss, gradient and update of the classifier, so that one may update rows as it goes, or
only some of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sicot_jax.classifier import losses
from sicot_jax.classifier import sampling as sampled
from sicot_jax.classifier import sharded as class_sharded
from sicot_jax.classifier.lazy_update import CatchUp
from sicot_jax.classifier.trust_ratio import TrustRatio
from sicot_jax.config import ConfigError, HeadConfig, LossConfig
from sicot_jax.parallel import mesh

Losses = dict[str, jax.Array]  # "total" and one mean cross-entropy per stream
Embeddings = dict[str, jax.Array]  # stream -> [B, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """The shared output layer, rows divided over all devices: kernel [C padded, D], bias and
    log_prior [C padded], float32.

    `log_prior` is the log share of each class in the training photos: constant, and here because it
    lives with the rows. `sampling` is what a sampled head keeps: "step" (int32, heads run so far),
    "touched" (int32 [C padded], the step up to which a row is accounted for) and "neighbours"
    (int32 [C padded, K], the graph of KNN softmax); empty otherwise.
    """

    kernel: jax.Array
    bias: jax.Array
    log_prior: jax.Array
    opt_state: optax.OptState
    sampling: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """What runs of one compiled step may differ in: scalars that all devices have, given to the
    step with every batch.

    seed: uint32, of what a step draws. learning_rate: float32, the height of its schedule. weights:
      stream -> float32, of its cross-entropy.
    """

    seed: Any
    learning_rate: Any
    weights: Mapping[str, Any]


Head = Callable[[Embeddings, jax.Array, Classifier, Numbers], tuple[Losses, Embeddings, Classifier]]


def start_classifier(
    config: HeadConfig,
    key,
    log_prior,
    *,
    num_classes: int,
    width: int,
    tx: optax.GradientTransformation,
) -> Classifier:
    """Rows ~ N(0, 0.01^2), bias 0; padding rows are zero and stay so. To be jitted: arrays are made
    where they live.

    Args:
      key: row c is drawn from fold_in(key, c), whatever the mesh and the number of classes.
      log_prior: float32 [C padded], divided by class.
    """
    kernel = class_sharded.normal_rows(
        key, log_prior.shape[0], num_classes=num_classes, width=width, scale=0.01
    )
    bias = jnp.zeros_like(log_prior)
    sampling = {}
    if config.kind in ("sampled", "knn"):
        sampling = {
            "step": jnp.zeros((), jnp.int32),
            "touched": jnp.zeros_like(log_prior, jnp.int32),
        }
    if config.kind == "knn":
        shape = log_prior.shape[0], config.neighbours
        sampling["neighbours"] = jnp.zeros(shape, jnp.int32, out_sharding=mesh.CLASS_ROWS)
    opt_state = tx.init({"classifier": {"kernel": kernel, "bias": bias}})
    return Classifier(kernel, bias, log_prior, opt_state, sampling)


def check(config: HeadConfig, *, num_classes: int, devices: int) -> None:
    """ConfigError where the head cannot run on that many classes and devices."""
    if num_classes < devices:
        raise ConfigError(
            f"{num_classes} classes on {devices} devices leave some without a class; lower mesh.data and mesh.model"
        )
    shard_classes = -(-num_classes // devices)
    if config.kind in ("sampled", "knn") and sampled.slots(config.sample_rate, shard_classes) < 1:
        raise ConfigError(
            f"head.sample_rate={config.sample_rate} of {shard_classes} classes a device leaves no class beside the labels'; "
            "raise it, or set head.kind=class_sharded"
        )
    if config.kind == "knn" and config.neighbours >= num_classes:
        raise ConfigError(
            f"head.neighbours={config.neighbours} of {num_classes} classes, wanted fewer than classes; lower it"
        )


def loss_weights(config: LossConfig) -> Mapping[str, float]:
    """Stream -> weight of its cross-entropy, streams without one left out."""
    weights = {stream: float(getattr(config, stream)) for stream in losses.STREAMS}
    return {stream: weight for stream, weight in weights.items() if weight}


def numbers_of(config: LossConfig, *, learning_rate: float, seed: int = 0) -> Numbers:
    weights = {stream: np.float32(weight) for stream, weight in loss_weights(config).items()}
    return Numbers(np.uint32(seed), np.float32(learning_rate), weights)


def make_head(
    config: HeadConfig,
    loss_config: LossConfig,
    *,
    num_classes: int,
    tx: optax.GradientTransformation,
    catch_up: CatchUp,
    trust_ratio: TrustRatio | None = None,
    still: int = 0,
    dtype=jnp.float32,
) -> Head:
    """The head `config.kind`.

    "class_sharded": all classes, exactly, rows divided over all devices, streaming
    (`class_sharded.loss_and_update`). "sampled": the labels' classes and a random share of the
    others; "knn": the labels' classes and their neighbours (`sampled`). Rows that take no part
    stand still, and are brought up to date when they do. "dense": the plain reference.

    Args:
      num_classes: rows of the kernel beyond it are padding: no probability, no gradient.
      tx: of {"classifier": {"kernel", "bias"}}; works element by element, since it is applied to
        some rows at a time,
        but for a trust ratio that it is given, and the learning rate.
      catch_up: what tx would have done to rows that missed steps; for the sampled heads.
      trust_ratio: of tx, where it scales by the norm of the whole kernel (LARS); for
        "class_sharded".
      still: last columns of the kernel that keep their values (`word_rows`); not for the sampled
        heads.
      dtype: of the inputs of the products; sums, softmax and loss are float32.
    """
    streams = tuple(loss_weights(loss_config))
    tau, smoothing = loss_config.logit_adjustment, loss_config.label_smoothing

    def update(gradient, state, **scaling):
        params = {"classifier": {"kernel": state["kernel"], "bias": state["bias"]}}
        scaling["learning_rate"] = state["learning_rate"]
        updates, opt_state = tx.update(
            {"classifier": gradient}, state["opt_state"], params, **scaling
        )
        new = {
            **state,
            **optax.apply_updates(params, updates)["classifier"],
            "opt_state": opt_state,
        }
        if still:
            learns = jnp.arange(new["kernel"].shape[1]) < new["kernel"].shape[1] - still
            new["kernel"] = jnp.where(learns, new["kernel"], state["kernel"])
        return new

    def state_of(classifier: Classifier, numbers: Numbers):
        """What an update changes, and the learning rate that it reads."""
        return {
            "kernel": classifier.kernel,
            "bias": classifier.bias,
            "opt_state": classifier.opt_state,
            "learning_rate": jnp.asarray(numbers.learning_rate),
        }

    def updated(classifier: Classifier, state, **sampling):
        changed = {name: state[name] for name in ("kernel", "bias", "opt_state")}
        return dataclasses.replace(classifier, **changed, **sampling)

    def dense(embeddings: Embeddings, label, classifier: Classifier, numbers: Numbers):
        def loss(embeddings, params):
            return losses.co_training_loss(
                embeddings,
                label,
                mesh.replicate(params["kernel"]),
                mesh.replicate(params["bias"]),
                weights=numbers.weights,
                log_prior=mesh.replicate(classifier.log_prior),
                tau=tau,
                smoothing=smoothing,
                num_classes=num_classes,
                dtype=dtype,
            )

        params = {"kernel": classifier.kernel, "bias": classifier.bias}
        (total, by_stream), (cotangents, gradient) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )({stream: mesh.shard_leading_axis(embeddings[stream]) for stream in streams}, params)
        return (
            {"total": total, **by_stream},
            cotangents,
            updated(classifier, update(gradient, state_of(classifier, numbers))),
        )

    streaming = {
        "num_classes": num_classes,
        "tau": tau,
        "smoothing": smoothing,
        "dtype": dtype,
        "chunk": config.chunk,
        "keep_logits": None if config.keep_logits == "no" else jnp.dtype(config.keep_logits),
    }

    def sharded(embeddings: Embeddings, label, classifier: Classifier, numbers: Numbers):
        values, cotangents, state = class_sharded.loss_and_update(
            embeddings,
            label,
            state_of(classifier, numbers),
            classifier.log_prior,
            weights=numbers.weights,
            update=update,
            trust_ratio=trust_ratio,
            **streaming,
        )
        return values, cotangents, updated(classifier, state)

    def fresh(state):
        return catch_up(state, missed=state["step"] - state["touched"], step=state["step"])

    def update_taken(gradient, state):
        step = state["step"] + 1
        return {
            **update(gradient, state),
            "step": step,
            "touched": jnp.maximum(state["touched"], step),
        }

    def of_some(embeddings: Embeddings, label, classifier: Classifier, numbers: Numbers):
        sampling = dict(classifier.sampling)
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(numbers.seed), 2), sampling["step"]
        )
        if config.kind == "knn":
            sampling["neighbours"] = jax.lax.cond(
                sampling["step"] % config.rebuild_steps == 0,
                lambda: sampled.class_graph(
                    classifier.kernel, num_classes=num_classes, k=config.neighbours, dtype=dtype
                ),
                lambda: sampling["neighbours"],
            )
            active = sampled.neighbour_classes(
                key, label, sampling["neighbours"], rate=config.sample_rate
            )
        else:
            rows = classifier.kernel.shape[0]
            active = sampled.uniform_classes(key, label, num_rows=rows, rate=config.sample_rate)
        taken = {name: sampling[name] for name in ("step", "touched")}
        values, cotangents, state = class_sharded.loss_and_update(
            embeddings,
            label,
            {**state_of(classifier, numbers), **taken},
            classifier.log_prior,
            weights=numbers.weights,
            update=update_taken,
            active=active,
            fresh=fresh,
            **streaming,
        )
        sampling |= {name: state[name] for name in taken}
        return values, cotangents, updated(classifier, state, sampling=sampling)

    return {"class_sharded": sharded, "sampled": of_some, "knn": of_some, "dense": dense}[
        config.kind
    ]


def temporary_bytes(
    config: HeadConfig,
    *,
    streams: int,
    batch: int,
    width: int,
    shard_classes: int,
    devices: int = 1,
    itemsize: int = 4,
    trains: bool = True,
    moments: int = 1,
) -> int:
    """What a head holds on one device while it runs, beyond kernel and optimizer; without the graph
    of "knn".

    Fitted to what XLA compiles on CPU, within 10 %. There 16-bit inputs of products are widened
    first, of a kernel that stays as it is for a while all rows at once; a device that multiplies
    16-bit numbers needs less. An upper bound, up to 30 % above, for a frozen kernel with "sampled",
    "knn" or 16 bits, and for "dense" on one device.

    Args:
      batch: photos of a step; every stream has an embedding of each.
      shard_classes: classes of one device.
      itemsize: bytes of a number in the products.
      trains: whether the kernel does.
      moments: arrays of the kernel's shape in its optimizer.
    """
    rows, narrow, kernel = streams * batch, itemsize < 4, 4 * shard_classes * width
    if config.kind == "dense":
        all_logits = 3 * 4 * shard_classes * rows  # their exponentials and their gradient too
        if devices == 1:
            return all_logits + (kernel if trains or narrow else 0)
        kernel *= devices  # whole, and by stream its gradient and that summed over devices
        return max(
            2 * streams * kernel if trains else 0,
            kernel + max(all_logits, kernel // 2 if narrow else 0),
        )
    exact = config.kind == "class_sharded"
    taken = shard_classes if exact else batch + sampled.slots(config.sample_rate, shard_classes)
    chunk = min(config.chunk, taken)
    part, logits, embeddings = 4 * chunk * width, 4 * chunk * rows, 4 * rows * width
    kept = taken * rows * {"no": 0, "bfloat16": 2, "float32": 4}[config.keep_logits]
    if (
        not exact
    ):  # rows gathered and brought up to date; the chunk that is left over has logits of its own
        size = 4 * (taken % chunk) * rows + (1.25 * part if narrow else 0)
        size += (
            4.25 * part + 1.25 * logits + 0.75 * max(part, logits) + embeddings
            if trains
            else part + 2 * logits
        )
    elif trains and narrow:
        size = (3 + moments) * part + (kernel + logits if kept else 1.5 * logits + 2 * embeddings)
    elif trains:  # kernel, its gradient, moments, and one of them updated where the logits were
        size = (2 + moments) * part + max(part, logits) + 4 * embeddings
    else:
        size = kernel + 1.5 * (part + logits) if narrow else part + logits + 3 * embeddings
    return round(size + kept)
