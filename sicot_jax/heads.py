"""The classifier's state and the heads: (embeddings, label, classifier) -> (losses, embedding cotangents, new classifier).

A head owns loss, gradient and update of the classifier, so that one may update rows as it goes, or only some of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from sicot_jax import class_sharded, losses, mesh, sampled
from sicot_jax.config import ConfigError, HeadConfig, LossConfig
from sicot_jax.optim import CatchUp, TrustRatio

Losses = dict[str, jax.Array]  # "total" and one mean cross-entropy per stream
Embeddings = dict[str, jax.Array]  # stream -> [B, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """The shared output layer, rows divided over all devices: kernel [C padded, D], bias and log_prior [C padded], float32.

    `log_prior` is the log share of each class in the training photos: constant, and here because it lives with the rows.
    `sampling` is what a sampled head keeps: "step" (int32, heads run so far), "touched" (int32 [C padded], the step up to
    which a row is accounted for) and "neighbours" (int32 [C padded, K], the graph of KNN softmax); empty otherwise.
    """

    kernel: jax.Array
    bias: jax.Array
    log_prior: jax.Array
    opt_state: optax.OptState
    sampling: dict[str, jax.Array]


Head = Callable[[Embeddings, jax.Array, Classifier], tuple[Losses, Embeddings, Classifier]]


def start_classifier(
    config: HeadConfig, key, log_prior, *, num_classes: int, width: int, tx: optax.GradientTransformation
) -> Classifier:
    """Rows ~ N(0, 0.01^2), bias 0; padding rows are zero and stay so. To be jitted: arrays are made where they live.

    Args:
      key: row c is drawn from fold_in(key, c), whatever the mesh and the number of classes.
      log_prior: float32 [C padded], divided by class.
    """
    kernel = class_sharded.normal_rows(key, log_prior.shape[0], num_classes=num_classes, width=width, scale=0.01)
    bias = jnp.zeros_like(log_prior)
    sampling = {}
    if config.kind in ("sampled", "knn"):
        sampling = {"step": jnp.zeros((), jnp.int32), "touched": jnp.zeros_like(log_prior, jnp.int32)}
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


def make_head(
    config: HeadConfig,
    loss_config: LossConfig,
    *,
    num_classes: int,
    tx: optax.GradientTransformation,
    catch_up: CatchUp,
    trust_ratio: TrustRatio | None = None,
    seed: int = 0,
    dtype=jnp.float32,
) -> Head:
    """The head `config.kind`.

    "class_sharded": all classes, exactly, rows divided over all devices, streaming (`class_sharded.loss_and_update`).
    "sampled": the labels' classes and a random share of the others; "knn": the labels' classes and their neighbours
    (`sampled`). Rows that take no part stand still, and are brought up to date when they do.
    "dense": the plain reference.

    Args:
      num_classes: rows of the kernel beyond it are padding: no probability, no gradient.
      tx: of {"classifier": {"kernel", "bias"}}; works element by element, since it is applied to some rows at a time,
        but for a trust ratio that it is given.
      catch_up: what tx would have done to rows that missed steps; for the sampled heads.
      trust_ratio: of tx, where it scales by the norm of the whole kernel (LARS); for "class_sharded".
      seed: of the sampled classes.
      dtype: of the inputs of the products; sums, softmax and loss are float32.
    """
    weights = loss_weights(loss_config)
    tau = loss_config.logit_adjustment

    def update(gradient, state, **scaling):
        params = {"classifier": {"kernel": state["kernel"], "bias": state["bias"]}}
        updates, opt_state = tx.update({"classifier": gradient}, state["opt_state"], params, **scaling)
        return {**optax.apply_updates(params, updates)["classifier"], "opt_state": opt_state}

    def dense(embeddings: Embeddings, label, classifier: Classifier):
        def loss(embeddings, params):
            return losses.co_training_loss(
                embeddings,
                label,
                mesh.replicate(params["kernel"]),
                mesh.replicate(params["bias"]),
                weights=weights,
                log_prior=mesh.replicate(classifier.log_prior),
                tau=tau,
                num_classes=num_classes,
                dtype=dtype,
            )

        params = {"kernel": classifier.kernel, "bias": classifier.bias}
        (total, by_stream), (cotangents, gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            {stream: embeddings[stream] for stream in weights}, params
        )
        state = update(gradient, {**params, "opt_state": classifier.opt_state})
        return {"total": total, **by_stream}, cotangents, dataclasses.replace(classifier, **state)

    streaming = {
        "weights": weights,
        "num_classes": num_classes,
        "tau": tau,
        "dtype": dtype,
        "chunk": config.chunk,
        "keep_logits": None if config.keep_logits == "no" else jnp.dtype(config.keep_logits),
    }

    def sharded(embeddings: Embeddings, label, classifier: Classifier):
        state = {"kernel": classifier.kernel, "bias": classifier.bias, "opt_state": classifier.opt_state}
        values, cotangents, state = class_sharded.loss_and_update(
            embeddings, label, state, classifier.log_prior, update=update, trust_ratio=trust_ratio, **streaming
        )
        return values, cotangents, dataclasses.replace(classifier, **state)

    def fresh(state):
        return catch_up(state, missed=state["step"] - state["touched"], step=state["step"])

    def update_taken(gradient, state):
        step = state["step"] + 1
        return {**update(gradient, state), "step": step, "touched": jnp.maximum(state["touched"], step)}

    def of_some(embeddings: Embeddings, label, classifier: Classifier):
        sampling = dict(classifier.sampling)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), sampling["step"])
        if config.kind == "knn":
            sampling["neighbours"] = jax.lax.cond(
                sampling["step"] % config.rebuild_steps == 0,
                lambda: sampled.class_graph(
                    classifier.kernel, num_classes=num_classes, k=config.neighbours, dtype=dtype
                ),
                lambda: sampling["neighbours"],
            )
            active = sampled.neighbour_classes(key, label, sampling["neighbours"], rate=config.sample_rate)
        else:
            rows = classifier.kernel.shape[0]
            active = sampled.uniform_classes(key, label, num_rows=rows, rate=config.sample_rate)
        state = {
            "kernel": classifier.kernel,
            "bias": classifier.bias,
            "opt_state": classifier.opt_state,
            "step": sampling["step"],
            "touched": sampling["touched"],
        }
        values, cotangents, state = class_sharded.loss_and_update(
            embeddings, label, state, classifier.log_prior, update=update_taken, active=active, fresh=fresh, **streaming
        )
        sampling |= {"step": state.pop("step"), "touched": state.pop("touched")}
        return values, cotangents, dataclasses.replace(classifier, **state, sampling=sampling)

    return {"class_sharded": sharded, "sampled": of_some, "knn": of_some, "dense": dense}[config.kind]


def temporary_bytes(config: HeadConfig, *, rows: int, width: int, shard_classes: int) -> int:
    """What a head holds on one device while it runs, beyond kernel and optimizer; float32.

    Args:
      rows: embeddings of a step, streams times batch.
      shard_classes: classes of one device.
    """
    if config.kind == "dense":  # the kernel's gradient and update; logits, their exponentials and their gradient
        return 4 * shard_classes * (2 * width + 3 * rows)
    # A chunk of kernel, momentum and both of them updated, its logits.
    taken, copies = shard_classes, 4.0
    if config.kind != "class_sharded":  # gathered, and brought up to date
        copies = 5.5
        taken = rows + sampled.slots(config.sample_rate, shard_classes)
    chunk = min(config.chunk, taken)
    kept = {"no": 0, "bfloat16": 2, "float32": 4}[config.keep_logits]
    return round(4 * chunk * (copies * width + rows) + taken * kept * rows)
