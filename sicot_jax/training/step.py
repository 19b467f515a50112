"""TrainState and the training step: forward -> head -> backward -> optax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.statistics import log_prior
from sicot_jax.classifier import heads
from sicot_jax.classifier import losses as losses_lib
from sicot_jax.classifier.lazy_update import make_catch_up
from sicot_jax.classifier.trust_ratio import make_trust_ratio
from sicot_jax.common.trees import path_name
from sicot_jax.config import Config, ConfigError
from sicot_jax.config.batch_plan import BatchPlan
from sicot_jax.models.localization import area
from sicot_jax.models.sicot import Sicot
from sicot_jax.parallel import gradient_sync as exchange
from sicot_jax.parallel import mesh
from sicot_jax.training.augment import Crops, crop, crop_boxes, hide, random_crops, random_hidden
from sicot_jax.training.optimizer import make_schedule, make_tx, trained_parts

ExtraLoss = Callable[
    [dict[str, jax.Array], dict[str, jax.Array]], jax.Array
]  # (outputs, batch) -> scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on. `step` is also the data position; random keys are
    fold_in(seed, step).
    """

    step: jax.Array  # int32 scalar: updates done
    params: dict[str, Any]  # {"visual": ..., "semantic": ...}, float32, replicated
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    classifier: heads.Classifier
    unsent: (
        exchange.Unsent
    )  # what each device has not sent yet of its gradients, with train.gradient_ratio below 1


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What a catalogue decides about the model and the schedule."""

    num_classes: int
    vocabulary_size: int
    word_width: int
    train_photos: int

    @classmethod
    def of(cls, catalog: Catalog) -> DataShape:
        vocabulary_size, word_width = catalog.word_vectors.shape
        return cls(len(catalog.classes), vocabulary_size, word_width, len(catalog.splits["train"]))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed for a run: the functions and shapes behind `train_step`.

    `steps` are updates; `steps_per_epoch` those of the first batch size, more than there are once
    the batch has grown (`epoch_at` counts records).
    """

    config: Config
    shape: DataShape
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    visual_graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    head: heads.Head
    plan: BatchPlan
    steps: int
    steps_per_epoch: float

    def numbers(self) -> heads.Numbers:
        """Of its config, as NumPy scalars."""
        return heads.numbers_of(
            self.config.loss, learning_rate=self.config.optim.learning_rate, seed=self.config.seed
        )

    def epoch_at(self, step: int) -> float:
        """Epochs done before that step."""
        return self.plan.batches_before(step) / self.steps_per_epoch


def compute_dtype(config: Config):
    return jnp.dtype(config.train.compute_dtype)


def make_setup(config: Config, shape: DataShape, device_mesh) -> Setup:
    """Check the config against data and mesh, and build the run's functions. Allocates nothing on
    the device.
    """
    if config.loss.with_text and shape.vocabulary_size < 2:
        raise ConfigError(
            "the catalogue has no titles, and loss.mixed or loss.tag_prediction wants them; import it with some (sicot "
            "import --titles-from RUN) or set both to 0 and model.shared_word_weights=False (baseline)"
        )
    if config.model.shared_word_weights and shape.vocabulary_size < 2:
        raise ConfigError(
            "the catalogue has no titles, and model.shared_word_weights=True wants them; set it to False, or import the catalogue with "
            "some (sicot import --titles-from RUN)"
        )
    heads.check(config.head, num_classes=shape.num_classes, devices=device_mesh.size)
    steps_per_epoch = shape.train_photos / config.train.batch_size
    plan = config.train.batch_plan(shape.train_photos)
    steps = config.train.total_steps(shape.train_photos)
    # Of height 1: the learning rate comes with the call, so that one compiled step serves all.
    optim = dataclasses.replace(config.optim, learning_rate=1.0)
    schedule = make_schedule(optim, plan, steps=steps, photos=shape.train_photos)
    tx = make_tx(optim, schedule)

    def graph():
        net = new_net(config, shape)
        return net, net.visual

    net, visual = nnx.eval_shape(graph)
    names = [
        path_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            nnx.to_pure_dict(nnx.state(net, nnx.Param))
        )
    ]
    if not any(
        config.optim.trains(name) for name in (*names, "classifier/kernel", "classifier/bias")
    ):
        raise ConfigError(
            f"optim.trainable={config.optim.trainable!r} matches no parameter; e.g. classifier, visual/resnet"
        )
    return Setup(
        config=config,
        shape=shape,
        mesh=device_mesh,
        graphdef=nnx.split(net, nnx.Param, nnx.BatchStat)[0],
        visual_graphdef=nnx.split(visual, nnx.Param, nnx.BatchStat)[0],
        tx=tx,
        head=heads.make_head(
            config.head,
            config.loss,
            num_classes=shape.num_classes,
            tx=tx,
            catch_up=make_catch_up(config.optim, schedule),
            trust_ratio=make_trust_ratio(config.optim),
            still=words_shared(config, shape),
            dtype=compute_dtype(config),
        ),
        plan=plan,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
    )


def check_batches(config: Config, device_mesh) -> None:
    """ConfigError where a batch cannot be divided over the devices."""
    devices = device_mesh.size
    for name, size in {
        "train.batch_size / train.micro_batches": config.train.batch_size
        // config.train.micro_batches,
        "eval.batch_size": config.eval.batch_size,
    }.items():
        if size % devices:
            raise ConfigError(
                f"{name}={size} is not divisible by {devices} devices; use a multiple of {devices}"
            )


def new_net(config: Config, shape: DataShape) -> Sicot:
    return Sicot(
        config.model,
        words=(shape.vocabulary_size, shape.word_width) if config.loss.with_semantic else None,
        told=words_told(config, shape),
        coded=bool(config.loss.codes),
        codes_shape_embedding=config.loss.codes_shape_embedding,
        compared=bool(config.loss.background_suppression or config.loss.triplet),
        dtype=compute_dtype(config),
        rng=np.random.default_rng(config.seed),
    )


def words_told(config: Config, shape: DataShape) -> int:
    """How many words have a score: the first of the vocabulary, which are the most frequent; 0
    where no score is wanted.
    """
    wanted = config.model.shared_word_weights or config.loss.tag_prediction
    return min(config.model.tag_vocabulary, shape.vocabulary_size - 1) if wanted else 0


def words_shared(config: Config, shape: DataShape) -> int:
    """How many of a classifier row's numbers, its last ones, are shares of words."""
    return words_told(config, shape) if config.model.shared_word_weights else 0


def start_state(setup: Setup, log_prior: jax.Array) -> TrainState:
    """A fresh state under the mesh, a pure function of the config's seed.

    Args:
      log_prior: float32 [C padded], divided by class.
    """
    net = new_net(setup.config, setup.shape)
    split: Any = nnx.split(net, nnx.Param, nnx.BatchStat)
    _, params, batch_stats = split
    params, batch_stats = mesh.copy_to_all(
        (nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)), setup.mesh
    )

    def classifier(key, log_prior):
        return heads.start_classifier(
            setup.config.head,
            key,
            log_prior,
            num_classes=setup.shape.num_classes,
            width=net.visual.embedding_width,
            tx=setup.tx,
        )

    key = jax.random.fold_in(jax.random.key(setup.config.seed), 1)
    step = mesh.copy_to_all(jnp.zeros((), jnp.int32), setup.mesh)
    opt_state = mesh.copy_to_all(setup.tx.init(params), setup.mesh)
    unsent = jax.jit(
        lambda: exchange.nothing_unsent(kernels_sent_in_part(setup.config, params), setup.mesh.size)
    )()
    return TrainState(
        step, params, batch_stats, opt_state, jax.jit(classifier)(key, log_prior), unsent
    )


def kernels_sent_in_part(config: Config, params: dict) -> dict[str, tuple[int, ...]]:
    """Path name -> shape of the arrays of two axes or more: of their gradients devices send the
    largest entries alone.
    """
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    sparse = config.train.gradient_ratio < 1
    return {
        name: shape
        for name, shape in shapes.items()
        if sparse and len(shape) > 1 and config.optim.trains(name)
    }


def make_train_step(setup: Setup, *, extra_losses: Mapping[str, ExtraLoss] | None = None):
    """The step: (state, batch[, numbers]) -> (state, losses); to be jitted with the state donated.

    forward -> head(embeddings, label, classifier) -> backward -> optax. `losses` holds "total", the
    mean cross-entropy of each stream, and each of `extra_losses` (named pure functions of (outputs,
    batch), added to the total).

    The streams run on each device by itself, but for batch-norm statistics, which are of all
    devices. Their gradients are exchanged once a step (`exchange`).

    With micro-batches: all of them forward for their embeddings, one head call over the stacked
    embeddings, then each forward again and backward from its share of the cotangents, so that
    memory is that of one micro-batch. While one is in the streams, the embeddings of the one before
    travel. Batch-norm statistics are those of each micro-batch. Extra losses are means over
    micro-batches.

    `numbers` are the config's own where none are given, compiled in.

    How many micro-batches a batch has follows from its size, theirs being fixed; so each size of a
    batch that grows compiles once. ValueError (when traced) for a size that they do not divide.
    """
    config = setup.config
    preprocessing = config.preprocessing
    extra_losses = {
        **_word_losses(config),
        **_code_losses(config),
        **_box_losses(config),
        **(extra_losses or {}),
    }
    streams = tuple(heads.loss_weights(config.loss))
    micro_batch = config.train.batch_size // config.train.micro_batches

    def draw(key, image):
        """-> what makes the network's input of bytes: small, unlike the input, which micro-batches
        make one at a time.
        """
        options = config.augment
        if not options.enabled:
            return None, None
        crops = random_crops(
            key, image, min_area=options.min_area, max_ratio=options.max_ratio, flip=options.flip
        )
        return crops, random_hidden(
            jax.random.fold_in(key, 1), image, share=options.random_erasing
        ) if options.random_erasing else None

    def pixels(image, crops, hidden):
        if crops is None:
            return preprocessing.normalise(preprocessing.centre_crop(image))
        found = preprocessing.normalise(
            crop(image, crops, height=preprocessing.height, width=preprocessing.width)
        )
        return found if hidden is None else hide(found, hidden)

    def on_device(stacked, batch_stats, photos, token_ids):
        params = exchange.own(stacked)
        net = nnx.merge(setup.graphdef, params, batch_stats, copy=True)
        outputs = net(pixels(*photos), token_ids, train=trained_parts(config.optim, params))
        return outputs, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    # (a copy of the parameters for each device, batch statistics, photos, token ids) -> outputs,
    # new batch statistics
    forward = jax.shard_map(
        on_device,
        in_specs=(mesh.BATCH, jax.P(), mesh.BATCH, mesh.BATCH),
        out_specs=(mesh.BATCH, jax.P()),
    )

    def extras(outputs, batch):
        values = {name: function(outputs, batch) for name, function in extra_losses.items()}
        return sum(values.values(), jnp.zeros(())), values

    def linearise(stacked, batch_stats, photos, batch):
        """-> outputs, their pull-back to each device's copy of the parameters, new batch
        statistics.
        """
        return jax.vjp(
            lambda p: forward(p, batch_stats, photos, batch.get("token_ids")), stacked, has_aux=True
        )

    def pull_back(outputs, vjp, batch, cotangents, parts=1):
        """Gradient of the head's loss and the extra losses, and the latters' values."""
        (_, values), extra = jax.value_and_grad(extras, has_aux=True)(outputs, batch)
        # The head's loss is a mean over the whole batch already, the extra ones over this part of
        # it.
        full = {name: extra[name] / parts + cotangents.get(name, 0) for name in outputs}
        return vjp(full)[0], values

    def whole(stacked, state, photos, batch, numbers):
        outputs, vjp, batch_stats = linearise(stacked, state.batch_stats, photos, batch)
        losses, cotangents, classifier = setup.head(
            {stream: outputs[stream] for stream in streams},
            batch["label"],
            state.classifier,
            numbers,
        )
        gradient, values = pull_back(outputs, vjp, batch, cotangents)
        return losses, classifier, gradient, batch_stats, values

    def in_parts(parts, stacked, state, photos, batch, numbers):
        def cut(x):
            # [B, ...] -> [parts, B / parts, ...]; part p takes rows p, p + parts, ..., so that no
            # row changes its device.
            shape = (x.shape[0] // parts, parts, *x.shape[1:])
            return x.reshape(shape, out_sharding=mesh.batch_spec(len(shape))).swapaxes(0, 1)

        cut_photos, batches = jax.tree.map(cut, (photos, batch))

        def embed(before, part):
            photos, batch = part
            gathered = jax.tree.map(
                mesh.replicate, before
            )  # on its way while these photos are in the streams
            outputs, _ = forward(stacked, state.batch_stats, photos, batch.get("token_ids"))
            return {stream: outputs[stream] for stream in streams}, gathered

        def join(gathered, last):
            x = jnp.concatenate([gathered[1:], mesh.replicate(last)[None]])  # [parts, B / parts, D]
            return x.swapaxes(0, 1).reshape(-1, x.shape[-1])

        nothing = jnp.zeros(
            (micro_batch, state.classifier.kernel.shape[1]), out_sharding=mesh.batch_spec(2)
        )
        last, gathered = jax.lax.scan(embed, dict.fromkeys(streams, nothing), (cut_photos, batches))
        losses, cotangents, classifier = setup.head(
            jax.tree.map(join, gathered, last), batch["label"], state.classifier, numbers
        )

        def one(carry, part):
            gradient, batch_stats = carry
            photos, batch, cotangents = part
            outputs, vjp, batch_stats = linearise(stacked, batch_stats, photos, batch)
            new, values = pull_back(outputs, vjp, batch, cotangents, parts)
            return (jax.tree.map(jnp.add, gradient, new), batch_stats), values

        start = (jax.tree.map(jnp.zeros_like, stacked), state.batch_stats)
        (gradient, batch_stats), values = jax.lax.scan(
            one, start, (cut_photos, batches, jax.tree.map(cut, cotangents))
        )
        return losses, classifier, gradient, batch_stats, jax.tree.map(jnp.mean, values)

    def train_step(
        state: TrainState, batch: dict[str, jax.Array], numbers: heads.Numbers | None = None
    ) -> tuple[TrainState, heads.Losses]:
        numbers = numbers or setup.numbers()
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        photos = batch["image"], *draw(key, batch["image"])
        batch = {name: value for name, value in batch.items() if name != "image"}
        if "box" in batch:
            batch["box"] = _boxes_in_crops(config, batch["box"], photos[1])
        size = len(batch["label"])
        parts, rest = divmod(size, micro_batch)
        if rest or not parts:
            raise ValueError(
                f"a batch of {size} photos, wanted a multiple of micro-batches of {micro_batch}"
            )
        run = whole if parts == 1 else functools.partial(in_parts, parts)
        losses, classifier, gradient, batch_stats, values = run(
            exchange.copies(state.params), state, photos, batch, numbers
        )
        losses = {
            **losses,
            **values,
            "total": losses["total"] + sum(values.values(), jnp.zeros(())),
        }
        if state.unsent:
            gradient, unsent = exchange.largest_summed(
                gradient, state.unsent, ratio=config.train.gradient_ratio
            )
        else:
            gradient, unsent = exchange.summed(gradient), {}
        updates, opt_state = setup.tx.update(
            gradient, state.opt_state, state.params, learning_rate=numbers.learning_rate
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(
            state.step + 1, params, batch_stats, opt_state, classifier, unsent
        ), losses

    return train_step


def _word_losses(config: Config) -> dict[str, ExtraLoss]:
    """The loss of telling a title's words."""
    if not config.loss.tag_prediction:
        return {}

    def words(outputs, batch):
        return config.loss.tag_prediction * losses_lib.word_loss(outputs["words"], batch["token_ids"])

    return {"words": words}


def _code_losses(config: Config) -> dict[str, ExtraLoss]:
    """The loss of the binary layer: each device compares its photos with all of the batch."""
    loss = config.loss
    if not loss.codes:
        return {}

    def codes(outputs, batch):
        bits, unit = outputs["codes"], outputs["unit"]
        likeness = losses_lib.code_likeness(bits, unit, mesh.replicate(bits), mesh.replicate(unit))
        balance, quantisation = losses_lib.code_balance(bits), losses_lib.code_quantisation(bits)
        return loss.codes * (
            likeness + loss.code_balance * balance + loss.code_quantisation * quantisation
        )

    return {"codes": codes}


def _boxes_in_crops(config: Config, box, crops: Crops | None):
    """Known boxes as fractions of what the network sees; of the middle where there are no `crops`."""
    p = config.preprocessing
    if crops is None:
        zeros = jnp.zeros_like(box[:, 0])
        rows, columns = (p.resize_height - p.height) / 2, (p.resize_width - p.width) / 2
        crops = Crops(zeros + rows, zeros + columns, zeros + p.height, zeros + p.width, zeros > 0)
    return crop_boxes(box, crops, height=p.resize_height, width=p.resize_width)


def _box_losses(config: Config) -> dict[str, ExtraLoss]:
    """The losses of the box branch, and of triplets with or without one."""
    loss = config.loss
    found: dict[str, ExtraLoss] = {}

    def box(outputs, batch):
        label = batch["label"]
        told = losses_lib.told_outside(
            outputs["outside"], mesh.replicate(outputs["inside"]), label, mesh.replicate(label)
        )
        return loss.background_suppression * (told + loss.box_area * jnp.mean(jnp.log(area(outputs["box"]))))

    def known(outputs, batch):
        return loss.box_regression * losses_lib.box_distance(outputs["box"], batch["box"])

    def triplet(outputs, batch):
        unit, label = outputs["inside"], batch["label"]
        return loss.triplet * losses_lib.triplet_loss(
            unit, mesh.replicate(unit), label, mesh.replicate(label), margin=loss.triplet_margin
        )

    for name, weight, function in (
        ("box", loss.background_suppression, box),
        ("box_known", loss.box_regression, known),
        ("triplet", loss.triplet, triplet),
    ):
        if weight:
            found[name] = function
    return found


def class_log_prior(train_counts: np.ndarray, device_mesh) -> np.ndarray:
    """float32 [C padded]: `log_prior` of the classes, 0 for padding."""
    padding = mesh.pad_classes(len(train_counts), device_mesh) - len(train_counts)
    return np.pad(log_prior(train_counts), (0, padding)).astype(np.float32)


def abstract_state(setup: Setup) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated; under
    `jax.set_mesh(setup.mesh)`.
    """
    padded = mesh.pad_classes(setup.shape.num_classes, setup.mesh)
    prior = jax.ShapeDtypeStruct((padded,), jnp.float32, sharding=mesh.class_sharding(setup.mesh))
    state = jax.eval_shape(lambda prior: start_state(setup, prior), prior)
    return mesh.on_devices(state, setup.mesh)
