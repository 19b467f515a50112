"""The classifier's state and the heads: (embeddings, label, classifier) -> (losses, embedding cotangents, new classifier).

A head owns loss, gradient and update of the classifier, so that one may update rows as it goes, or only some of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from sicot_jax import class_sharded, losses, mesh
from sicot_jax.config import HeadConfig, LossConfig
from sicot_jax.errors import InputError

Losses = dict[str, jax.Array]  # "total" and one mean cross-entropy per stream
Embeddings = dict[str, jax.Array]  # stream -> [B, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """The shared output layer, rows divided over all devices: kernel [C padded, D], bias and log_prior [C padded], float32.

    `log_prior` is the log share of each class in the training photos: constant, and here because it lives with the rows.
    """

    kernel: jax.Array
    bias: jax.Array
    log_prior: jax.Array
    opt_state: optax.OptState


Head = Callable[[Embeddings, jax.Array, Classifier], tuple[Losses, Embeddings, Classifier]]


def start_classifier(key, log_prior, *, num_classes: int, width: int, tx: optax.GradientTransformation) -> Classifier:
    """Rows ~ N(0, 0.01^2), bias 0; padding rows are zero and stay so. To be jitted: arrays are made where they live.

    Args:
      key: row c is drawn from fold_in(key, c), whatever the mesh and the number of classes.
      log_prior: float32 [C padded], divided by class.
    """
    kernel = class_sharded.normal_rows(key, log_prior.shape[0], num_classes=num_classes, width=width, scale=0.01)
    bias = jnp.zeros_like(log_prior)
    return Classifier(kernel, bias, log_prior, tx.init({"classifier": {"kernel": kernel, "bias": bias}}))


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
    dtype=jnp.float32,
) -> Head:
    """The head `config.kind`: "class_sharded" (rows divided over all devices, streaming) or its plain reference "dense".

    Args:
      num_classes: rows of the kernel beyond it are padding: no probability, no gradient.
      tx: of {"classifier": {"kernel", "bias"}}; works element by element, since the class-sharded head applies it to
        some rows at a time.
      dtype: of the inputs of the products; sums, softmax and loss are float32.
    """
    weights = loss_weights(loss_config)
    tau = loss_config.logit_adjustment

    def update(gradient, opt_state, params):
        updates, opt_state = tx.update({"classifier": gradient}, opt_state, {"classifier": params})
        return optax.apply_updates({"classifier": params}, updates)["classifier"], opt_state

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
        params, opt_state = update(gradient, classifier.opt_state, params)
        return {"total": total, **by_stream}, cotangents, dataclasses.replace(classifier, **params, opt_state=opt_state)

    def sharded(embeddings: Embeddings, label, classifier: Classifier):
        values, cotangents, params, opt_state = class_sharded.loss_and_update(
            embeddings,
            label,
            {"kernel": classifier.kernel, "bias": classifier.bias},
            classifier.opt_state,
            classifier.log_prior,
            weights=weights,
            update=update,
            num_classes=num_classes,
            tau=tau,
            dtype=dtype,
            chunk=config.chunk,
            keep_logits=None if config.keep_logits == "no" else jnp.dtype(config.keep_logits),
        )
        return values, cotangents, dataclasses.replace(classifier, **params, opt_state=opt_state)

    match config.kind:
        case "class_sharded":
            return sharded
        case "dense":
            return dense
        case other:
            raise InputError(f"head.kind={other!r}, wanted class_sharded or dense")


def temporary_bytes(config: HeadConfig, *, rows: int, width: int, shard_classes: int) -> int:
    """What a head holds on one device while it runs, beyond kernel and optimizer; float32.

    Args:
      rows: embeddings of a step, streams times batch.
      shard_classes: classes of one device.
    """
    if config.kind == "dense":  # the kernel's gradient and update; logits, their exponentials and their gradient
        return 4 * shard_classes * (2 * width + 3 * rows)
    # A chunk of kernel, momentum and both of them updated, its logits; bias and offset of all classes.
    chunk = min(config.chunk, shard_classes)
    kept = {"no": 0, "bfloat16": 2, "float32": 4}[config.keep_logits]
    return 4 * chunk * (4 * width + rows) + shard_classes * (4 + kept * rows)
