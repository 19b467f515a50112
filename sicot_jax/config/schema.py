"""What a run is: frozen dataclasses, each of whose fields is checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from sicot_jax.config.batch_plan import SAMPLING_SCHEMES, BatchPlan, num_triplets
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

CONFIG_FORMAT = 1
TEXT_ENCODERS = (
    "mean",
    "bilinear",
    "low_rank",
    "bilinear_form",
    "dot",
    "lstm",
    "lstm_attention",
)  # of titles


class ConfigError(InputError):
    """A config that cannot be run; the message is one line: what, got, wanted, remedy."""


@dataclasses.dataclass(frozen=True)
class GeneratedSpec:
    """What a generated catalogue is made of.

    num_classes: C, the SKUs.
    train_photos: N, all training photos; counts fall as rank^-zipf_exponent, at least one each,
      ranks in random order.
    validation_per_class, test_per_class: photos of every class in these splits.
    image_size: photos are square.
    box_area: share of the photo that the product's tight box takes, its logarithm uniform over this
      range.
    clutter: 0 to 1, chance of a distractor product and amount of clutter shapes.
    informativeness: 0 to 1, chance that each informative word (brand, type, colour, pattern, mark,
      series) is in a
      title; otherwise a promotion word stands there, or nothing.
    word_sharing: 0 to 1, share of the informative words that head and tail classes have in common;
      the others have
      another form in each. Of the informative vocabulary that is word_sharing / (2 - word_sharing).
    word_vectors: "word2vec" (on at most 10,000 training titles) or "random"; word_vector_width: E.
    """

    num_classes: int = 100
    train_photos: int = 4000
    zipf_exponent: float = 1.0
    validation_per_class: int = 2
    test_per_class: int = 5
    image_size: int = 48
    box_area: tuple[float, float] = (0.3, 0.8)
    clutter: float = 0.5
    informativeness: float = 0.5
    word_sharing: float = 0.5
    seed: int = 0
    word_vectors: str = "word2vec"
    word_vector_width: int = 64


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how their titles are used.

    source: "generated" (from `generated`), "imported" (a folder of `sicot import`) or "arrays" (a
      file of
      `sicot export-arrays`); the last two at `path`.
    head_boundary: a class with more training photos is head; -1 takes the catalogue's own.
    title: "raw", "masked" (words of SKU and category removed), "shuffled" (another photo's title),
      "shuffled_within_class" or "none".
    max_tokens: words of a title that are read.
    sampling: "uniform", "class_balanced" or "square_root".
    workers: processes that prepare batches; 0 uses threads of this process.
    on_device: all training photos lie on every device, and a batch is gathered there; for "arrays".
    triplets: what was clicked rather than what (a file of `sicot events triplets`; `clicks`), ""
      for none; queries: the folder
      of their photos (`sicot serve --keep-queries`, or named by query_image_id), "" where all are
      training photos.
    triplet_share: of a batch's photos, those that come in triplets; the others are drawn as
      `sampling` says.
    """

    source: str = "generated"
    path: str = ""
    generated: GeneratedSpec = GeneratedSpec()
    head_boundary: int = -1
    title: str = "raw"
    max_tokens: int = 16
    sampling: str = "uniform"
    workers: int = 0
    on_device: bool = False
    triplets: str = ""
    queries: str = ""
    triplet_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random resized crop (area share from `min_area` to 1, aspect ratio up to `max_ratio`) and
    horizontal flip; of a share `hide` of the photos a part is hidden, for a network that boxes are
    learned with (`loss.background_suppression`).
    """

    enabled: bool = True
    min_area: float = 0.35
    max_ratio: float = 4 / 3
    flip: bool = True
    random_erasing: float = 0.0


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The semantic stream; see `models/attention.py` for encoders and weightings. The word width is
    the catalogue's.
    """

    encoder: str = "bilinear"
    windows: int = 8
    hidden: int = 64
    weighting: str = "softmax"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The visual stream (see `models/resnet.py`); `embedding_width=0` takes the ResNet's own width.

    title_words: how many words a photo gets a score for, where `loss.tag_prediction` or `word_rows`
      asks for it: the most
      frequent ones of the training titles.
    word_rows: the classifier adds to a class's own score the mean score of its titles' words
      (`word_rows.class_words`). While
      it trains, rows are longer by `title_words` columns, which cost memory and products; what is
      tested has none of them.
    code_bits: of the binary code that a photo gets, where `loss.codes` asks for one; for `sicot
      index build --codes learned`.
    box: whether the product is looked for first (`models/box`), and where what is outside of its
      box is hidden: "none",
      "image" (the photo, which the backbone then sees a second time) or "features" (its last map).
      Boxes are learned with `loss.background_suppression` and "image", from a run that knows the products already
      (`init_from`); "features" takes them over from there.
    init_from: a run folder, or converted weights (`sicot convert from-torch`), that this one starts
      from (`warm_start`).
    """

    depth: int = 50
    width: int = 64
    stem: str = "imagenet"
    last_stride: int = 2
    embedding_width: int = 0
    text: TextConfig = TextConfig()
    tag_vocabulary: int = 1024
    shared_word_weights: bool = False
    code_bits: int = 256
    localization: str = "none"
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the cross-entropies through the shared classifier, the tau of logit adjustment,
    label smoothing; `title_words` is the weight of telling a title's words from its photo
    (`losses.word_loss`), `codes` that of the binary layer's terms (`losses.code_likeness`), in
    which `code_balance` and `code_quantisation` are the weights of the two beside likeness. With
    `codes_shape_embedding` they train the embedding too, else the layer alone. `box` is the weight
    of what the outside of a photo's box tells (`losses.told_outside`) and, times `box_area`, of the
    log of its area; `box_known` that of the distance to boxes that the manifest has. `triplet` is
    the weight of photos of one product being nearer to each other than to others, by
    `triplet_margin` (`losses.triplet_loss`).

    Baseline: visual 1, mixed 0. Co-training (Eq. 1): visual 1, mixed lambda = 1. Doubled baseline:
      visual 2, mixed 0.
    """

    visual: float = 1.0
    mixed: float = 1.0
    logit_adjustment: float = 0.0
    label_smoothing: float = 0.0
    tag_prediction: float = 0.0
    codes: float = 0.0
    code_balance: float = 0.1
    code_quantisation: float = 0.01
    codes_shape_embedding: bool = False
    background_suppression: float = 0.0
    box_area: float = 0.7
    box_regression: float = 0.0
    triplet: float = 0.0
    triplet_margin: float = 0.2

    @property
    def with_text(self) -> bool:
        """Whether titles are read."""
        return self.with_semantic or bool(self.tag_prediction)

    @property
    def with_semantic(self) -> bool:
        """Whether there is a semantic stream."""
        return bool(self.mixed)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How loss and update of the classifier are computed.

    kind: "class_sharded" (all classes, exactly), "sampled" (the labels' classes and a random share
      of the others), "knn"
      (the labels' classes and their nearest ones) or "dense" (the plain reference).
    chunk: classes at a time on a device; bounds the temporary memory at a few times chunk * (2 *
      batch + D) numbers.
    keep_logits: "no" computes the probabilities a second time for the gradient; "bfloat16" or
      "float32" keeps all logits
      of a step instead: one product of four less, for 2 * batch * classes / devices numbers.
    sample_rate: share of each device's classes that take part in a step beside the labels' own
      ("sampled", "knn").
    neighbours: classes that the graph of "knn" holds for each class; rebuild_steps: steps between
      two graphs.
    """

    kind: str = "class_sharded"
    chunk: int = 4096
    keep_logits: str = "no"
    sample_rate: float = 0.1
    neighbours: int = 64
    rebuild_steps: int = 1000


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule (see `optim.py`); the defaults but momentum and decay are SICoT 4.3's.

    name: "sgd", "lars" (for large batches; its learning rates are above 1) or "adamw".
    trust_coefficient: of "lars": the share of its own norm that a kernel's step has at learning
      rate 1.
    schedule: "step", "exponential", "cosine" or "constant".
    trainable: regex on parameter names ("visual/...", "semantic/...", "classifier/kernel"); e.g.
      "classifier" trains
      the classifier alone, "(?!visual/resnet)" freezes the backbone.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    trust_coefficient: float = 0.001
    schedule: str = "step"
    gamma: float = 0.8
    decay_epochs: float = 1.0
    warmup_epochs: float = 0.0
    trainable: str = ""

    def trains(self, name: str) -> bool:
        """Returns whether the parameter of that path name trains: `trainable` is matched from its
        beginning.
        """
        return re.match(self.trainable, name) is not None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` is global; `steps` (0 = from `epochs`) wins over `epochs`.

    micro_batches: parts of the batch that go through the backbone one after the other (gradient
      accumulation).
    gradient_ratio: share of each kernel's gradient (of arrays of two axes or more), the largest
      entries, that a device
      sends the others in a step; what it keeps counts in its next ones (`exchange`). 1 sends all of
      it. For slow connections between devices; sends less than all where it is below 1 / devices.
    grow_every_epochs: epochs after which batch and micro-batches double, again and again up to
      `max_micro_batches`, a
      micro-batch staying as large as it is; 0 keeps `batch_size`. Schedules go on by epochs
      (`sampling.BatchPlan`).
    evaluate_every_epochs: validation and choice of the best; checkpoint_every_seconds: the last
      state.
    """

    batch_size: int = 256
    epochs: float = 10.0
    steps: int = 0
    micro_batches: int = 1
    gradient_ratio: float = 1.0
    grow_every_epochs: float = 0.0
    max_micro_batches: int = 0
    compute_dtype: str = "float32"
    evaluate_every_epochs: float = 1.0
    checkpoint_every_seconds: float = 120.0
    checkpoint_every_steps: int = 0
    log_every_steps: int = 20
    tensorboard: bool = True

    def total_steps(self, train_photos: int) -> int:
        """Steps of the whole run, on a catalogue of that many training photos."""
        batches = max(1, round(self.epochs * train_photos / self.batch_size))
        return self.steps or self.batch_plan(train_photos).steps_for(batches)

    def batch_plan(self, train_photos: int) -> BatchPlan:
        """The batch of every step, on a catalogue of that many training photos."""
        doublings = (
            (self.max_micro_batches // self.micro_batches).bit_length() - 1
            if self.grow_every_epochs
            else 0
        )
        every = self.grow_every_epochs * train_photos / self.batch_size
        if doublings and every < 1:
            raise ConfigError(
                f"train.grow_every_epochs={self.grow_every_epochs} is {every:.2g} steps of {self.batch_size} of "
                f"{train_photos} photos, wanted one or more; raise it"
            )
        return BatchPlan.growing(self.batch_size, doublings=doublings, every=every)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; data=0 takes all that are left over."""

    data: int = 0
    model: int = 1


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How photos are recognised in validation and test.

    max_photos: 0 reads all; top_k: classes kept for each photo (fewer where the catalogue has
      fewer).
    post_hoc_up_to_classes: up to that many, the finished classifier is also tested with its prior
      taken away and its rows
      normalised (`post_hoc.VARIANTS`); each is the classifier's product once more, some with a copy
      of its kernel.
    class_chunk: bounds the temporary memory at batch_size * class_chunk logits a device.
    """

    batch_size: int = 256
    max_photos: int = 0
    top_k: int = 10
    class_chunk: int = 16384
    keep_embeddings_up_to_classes: int = 50_000
    post_hoc_up_to_classes: int = 50_000


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; where it writes is `--workdir`."""

    seed: int = 0
    data: DataConfig = DataConfig()
    preprocessing: Preprocessing = Preprocessing()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        _check(self)


# Fields that may differ between a run and its continuation: where and how fast it runs, not what it
# computes.
FREE_ON_RESUME = (
    "mesh.data",
    "mesh.model",
    "data.path",
    "data.workers",
    "data.on_device",
    "data.triplets",  # the file's content may not
    "data.queries",
    "train.checkpoint_every_seconds",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.tensorboard",
    "eval.batch_size",
    "eval.class_chunk",
)


def _check(config: Config) -> None:
    data, train, loss = config.data, config.train, config.loss
    choices = {
        "data.source": (data.source, ("generated", "imported", "arrays")),
        "data.title": (data.title, ("raw", "masked", "shuffled", "shuffled_within_class", "none")),
        "data.sampling": (data.sampling, SAMPLING_SCHEMES),
        "optim.name": (config.optim.name, ("sgd", "lars", "adamw")),
        "optim.schedule": (config.optim.schedule, ("step", "exponential", "cosine", "constant")),
        "train.compute_dtype": (train.compute_dtype, ("float32", "bfloat16")),
        "head.kind": (config.head.kind, ("class_sharded", "sampled", "knn", "dense")),
        "model.localization": (config.model.localization, ("none", "image", "features")),
        "head.keep_logits": (config.head.keep_logits, ("no", "bfloat16", "float32")),
    }
    for name, (got, wanted) in choices.items():
        if got not in wanted:
            raise ConfigError(f"{name}={got!r}, wanted one of {wanted}{_hint(got, wanted)}")
    for name, value in flatten_config(config_to_dict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value}, wanted a finite number")
    if data.source != "generated" and not data.path:
        raise ConfigError(
            f"data.source={data.source!r} needs data.path; add --config.data.path=PATH (see sicot import)"
        )
    if data.on_device and data.source != "arrays":
        raise ConfigError(
            f"data.on_device with data.source={data.source!r}, whose photos are not of one size; write an array file (sicot "
            "export-arrays) and set data.source=arrays"
        )
    if data.queries and not data.triplets:
        raise ConfigError(
            f"data.queries={data.queries!r} without data.triplets, whose photos they are; add it"
        )
    if data.triplets and data.on_device:
        raise ConfigError(
            "data.triplets with data.on_device=True, which has no query photos beside the catalogue's; set data.on_device=False"
        )
    if not 0 < data.triplet_share <= 1:
        raise ConfigError(
            f"data.triplet_share={data.triplet_share}, wanted a share above 0 up to 1"
        )
    positive = {
        "train.batch_size": train.batch_size,
        "train.micro_batches": train.micro_batches,
        "train.log_every_steps": train.log_every_steps,
        "train.evaluate_every_epochs": train.evaluate_every_epochs,
        "eval.batch_size": config.eval.batch_size,
        "eval.top_k": config.eval.top_k,
        "eval.class_chunk": config.eval.class_chunk,
        "head.chunk": config.head.chunk,
        "head.neighbours": config.head.neighbours,
        "head.rebuild_steps": config.head.rebuild_steps,
        "data.max_tokens": data.max_tokens,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.gamma": config.optim.gamma,
        "optim.decay_epochs": config.optim.decay_epochs,
        "optim.trust_coefficient": config.optim.trust_coefficient,
        "steps or epochs": train.steps or train.epochs,
        "model.width": config.model.width,
        "model.text.windows": config.model.text.windows,
        "model.text.hidden": config.model.text.hidden,
        "mesh.model": config.mesh.model,
    }
    for name, number in positive.items():
        if not number > 0:
            raise ConfigError(f"{name}={number}, wanted a positive number")
    not_negative = {
        "mesh.data": config.mesh.data,
        "model.embedding_width": config.model.embedding_width,
        "data.workers": data.workers,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.warmup_epochs": config.optim.warmup_epochs,
        "loss.logit_adjustment": loss.logit_adjustment,
        "train.grow_every_epochs": train.grow_every_epochs,
        "train.max_micro_batches": train.max_micro_batches,
        "train.checkpoint_every_seconds": train.checkpoint_every_seconds,
        "train.checkpoint_every_steps": train.checkpoint_every_steps,
        "eval.max_photos": config.eval.max_photos,
        "eval.keep_embeddings_up_to_classes": config.eval.keep_embeddings_up_to_classes,
        "eval.post_hoc_up_to_classes": config.eval.post_hoc_up_to_classes,
    }
    for name, number in not_negative.items():
        if not number >= 0:
            raise ConfigError(f"{name}={number}, wanted 0 or more")
    if config.model.last_stride not in (1, 2):
        raise ConfigError(f"model.last_stride={config.model.last_stride}, wanted 1 or 2")
    if not 0 < train.gradient_ratio <= 1:
        raise ConfigError(f"train.gradient_ratio={train.gradient_ratio}, wanted above 0, up to 1")
    if train.gradient_ratio < 1 and config.optim.name != "sgd":
        raise ConfigError(
            f"train.gradient_ratio={train.gradient_ratio} with optim.name={config.optim.name!r}, which scales a step by "
            "the size of a gradient that is not all there; set optim.name=sgd or train.gradient_ratio=1"
        )
    if not 0 <= config.optim.momentum < 1:
        raise ConfigError(
            f"optim.momentum={config.optim.momentum}, wanted 0 up to (not including) 1"
        )
    if config.eval.top_k < 3:
        raise ConfigError(
            f"eval.top_k={config.eval.top_k}, wanted 3 or more: the tables show top-1 and top-3"
        )
    try:
        re.compile(config.optim.trainable)
    except re.error as error:
        raise ConfigError(
            f"optim.trainable={config.optim.trainable!r} is no regular expression: {error}"
        ) from error
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed}, wanted 0 to 2^32 - 1")  # jax's keys take no more
    if not 0 < config.augment.min_area <= 1:
        raise ConfigError(
            f"augment.min_area={config.augment.min_area}, wanted a share above 0 up to 1"
        )
    if not config.augment.max_ratio >= 1:
        raise ConfigError(f"augment.max_ratio={config.augment.max_ratio}, wanted 1 or more")
    if not 0 <= loss.label_smoothing < 1:
        raise ConfigError(
            f"loss.label_smoothing={loss.label_smoothing}, wanted a share from 0 up to (not including) 1"
        )
    if loss.label_smoothing and config.head.kind in ("sampled", "knn"):
        raise ConfigError(
            f"loss.label_smoothing={loss.label_smoothing} with head.kind={config.head.kind!r}, which does not see all "
            "classes; set head.kind=class_sharded or loss.label_smoothing=0"
        )
    if config.model.tag_vocabulary < 1:
        raise ConfigError(f"model.tag_vocabulary={config.model.tag_vocabulary}, wanted 1 or more")
    if config.model.code_bits % 8 or not 0 < config.model.code_bits <= 4096:
        raise ConfigError(
            f"model.code_bits={config.model.code_bits}, wanted a multiple of 8 up to 4096"
        )
    if loss.codes_shape_embedding and not loss.codes:
        raise ConfigError(
            "loss.codes_shape_embedding=True with loss.codes=0: there are no codes; give loss.codes a weight"
        )
    if config.model.localization == "none" and (loss.background_suppression or loss.box_regression):
        raise ConfigError(
            "loss.background_suppression or loss.box_regression with model.localization='none': there is no box to learn; set model.localization to image or features"
        )
    if loss.box_regression and data.on_device:
        raise ConfigError(
            "loss.box_regression with data.on_device=True, which keeps no boxes beside the photos; set data.on_device=False"
        )
    if not 0 <= config.augment.random_erasing <= 1:
        raise ConfigError(
            f"augment.random_erasing={config.augment.random_erasing}, wanted a share from 0 to 1"
        )
    if loss.codes and train.batch_size // train.micro_batches < 2:
        raise ConfigError(
            f"loss.codes={loss.codes} with one photo at a time (train.batch_size={train.batch_size} / train.micro_batches="
            f"{train.micro_batches}): codes are learned from pairs; lower train.micro_batches"
        )
    if config.model.shared_word_weights and config.head.kind in ("sampled", "knn"):
        raise ConfigError(
            f"model.shared_word_weights=True with head.kind={config.head.kind!r}, whose rows that miss steps decay when they are met "
            "again; set head.kind=class_sharded or model.shared_word_weights=False"
        )
    if config.model.shared_word_weights and config.optim.name == "lars":
        raise ConfigError(
            "model.shared_word_weights=True with optim.name='lars', whose steps follow the length of rows that do not move; set "
            "optim.name=sgd or model.shared_word_weights=False"
        )
    if config.model.shared_word_weights and data.title == "none":
        raise ConfigError(
            "model.shared_word_weights=True with data.title='none': there is no title to take words of; set one of the two otherwise"
        )
    if not 0 < config.head.sample_rate <= 1:
        raise ConfigError(
            f"head.sample_rate={config.head.sample_rate}, wanted a share above 0 up to 1"
        )
    if config.head.kind in ("sampled", "knn") and config.optim.name != "sgd":
        reason = "rows that miss steps can be brought up to date for sgd alone"
        if config.optim.name == "lars":
            reason = "the norm of a kernel whose rows are not all up to date is no norm of it"
        raise ConfigError(
            f"head.kind={config.head.kind!r} with optim.name={config.optim.name!r}: {reason}; set optim.name=sgd or "
            "head.kind=class_sharded"
        )
    if train.batch_size % train.micro_batches:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by train.micro_batches={train.micro_batches}; change one"
        )
    micro_batch = train.batch_size // train.micro_batches
    if data.triplets and not num_triplets(micro_batch, data.triplet_share):
        raise ConfigError(
            f"data.triplet_share={data.triplet_share} of a micro-batch of {micro_batch} photos holds no triplet; raise it or "
            "train.batch_size"
        )
    if train.grow_every_epochs or train.max_micro_batches:
        if not (train.grow_every_epochs and train.max_micro_batches):
            raise ConfigError(
                f"train.grow_every_epochs={train.grow_every_epochs} with train.max_micro_batches="
                f"{train.max_micro_batches}: a batch that grows wants both; set both, or both to 0"
            )
        times, rest = divmod(train.max_micro_batches, train.micro_batches)
        if rest or times < 2 or times & (times - 1):
            raise ConfigError(
                f"train.max_micro_batches={train.max_micro_batches}, wanted train.micro_batches={train.micro_batches} "
                "doubled once or more often"
            )
    if not (loss.visual or loss.mixed):
        raise ConfigError("loss.visual and loss.mixed are both 0; give at least one a weight")
    weights = [
        loss.visual,
        loss.mixed,
        loss.tag_prediction,
        loss.codes,
        loss.code_balance,
        loss.code_quantisation,
    ]
    weights += [loss.background_suppression, loss.box_area, loss.box_regression, loss.triplet]
    if min(weights) < 0:
        raise ConfigError(f"loss weights {', '.join(map(str, weights))}: wanted no negative one")
    if loss.with_text and data.title == "none":
        raise ConfigError(
            "data.title='none' leaves nothing to read; set loss.mixed=0 and loss.tag_prediction=0"
        )


def _hint(got: Any, wanted: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(got), wanted, 1)
    return f"; did you mean {close[0]}?" if close else ""


def config_to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
