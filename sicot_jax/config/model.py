"""Config sections of the network, its losses and its classifier head."""

from __future__ import annotations

import dataclasses

from sicot_jax.config.checks import ConfigError, FieldChecks

TEXT_ENCODERS = ("mean", "bilinear", "low_rank", "bilinear_form", "dot", "lstm", "lstm_attention")
HEAD_KINDS = ("class_sharded", "sampled", "knn", "dense")
LOCALIZATIONS = ("none", "image", "features")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sets the encoder of the semantic stream: `model.text.*`; the word width is the catalogue's.

    Attributes:
      encoder: how the words of a title become one vector; see `models/text_encoder.py`.
      windows: windows of the bilinear pooling, or rank of "low_rank".
      hidden: width of the scoring network, or of the LSTM.
      weighting: "softmax" normalises attention over the words of a title, "sigmoid" weighs each
        word by itself. Set "sigmoid" for converted weights that were trained so.

    Raises:
      ConfigError: a field outside its range.
    """

    encoder: str = "bilinear"
    windows: int = 8
    hidden: int = 64
    weighting: str = "softmax"

    def __post_init__(self) -> None:
        FieldChecks("model.text", self).positive("windows", "hidden")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sets the visual stream (a ResNet, see `models/resnet.py`) and its heads: `model.*`.

    Attributes:
      depth: layers of the ResNet: 10, 18, 34, 50, 101 or 152.
      width: channels of its first stage.
      stem: "imagenet", or "half" and "small" for small photos.
      last_stride: 1 or 2, stride of the last stage.
      embedding_width: D; 0 uses the ResNet's output width without a projection.
      text: the semantic stream.
      tag_vocabulary: tags (the most frequent words of the training titles) that get a score, where
        `loss.tag_prediction` or `shared_word_weights` needs scores. Classifier rows are longer by
        that many columns while training; lower it where they do not fit in memory.
      shared_word_weights: adds the mean tag score of a class's title words to its logit, so
        that classes share weights through words. Folded into plain class weights before testing.
      code_bits: length of the binary code of `loss.codes`, a multiple of 8; more bits cost index
        memory and gain recall.
      localization: "none", or where the photo outside of a predicted product box is suppressed:
        "image" (the backbone then processes the masked photo in a second pass) or "features" (its
        last feature map). The box is learned with `loss.background_suppression` and "image",
        starting from a trained run (`init_from`); "features" takes the box branch over from there.
      init_from: run folder, or converted weights (`sicot convert from-torch`), that training starts
        from.

    Raises:
      ConfigError: a field outside its range.
    """

    depth: int = 50
    width: int = 64
    stem: str = "imagenet"
    last_stride: int = 2
    embedding_width: int = 0
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    tag_vocabulary: int = 1024
    shared_word_weights: bool = False
    code_bits: int = 256
    localization: str = "none"
    init_from: str = ""

    def __post_init__(self) -> None:
        check = FieldChecks("model", self)
        check.choice("localization", LOCALIZATIONS)
        check.positive("width")
        check.not_negative("embedding_width")
        if self.last_stride not in (1, 2):
            check.refuse("last_stride", "1 or 2")
        if self.tag_vocabulary < 1:
            check.refuse("tag_vocabulary", "1 or more")
        if self.code_bits % 8 or not 0 < self.code_bits <= 4096:
            check.refuse("code_bits", "a multiple of 8 up to 4096")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weighs the terms of the loss: `loss.*`.

    Baseline: visual 1, mixed 0. Co-training (SICoT, Eq. 1): visual 1, mixed lambda = 1. Doubled
    baseline: visual 2, mixed 0.

    Attributes:
      visual: weight of the cross-entropy of the visual embedding.
      mixed: weight of the cross-entropy of the mixed embedding, lambda.
      logit_adjustment: tau; tau * log prior is added to the logits in training (Menon et al. 2021).
      label_smoothing: epsilon of label smoothing.
      tag_prediction: weight of predicting a title's words from its photo
        (`auxiliary_losses.tag_prediction_loss`).
      codes: weight of the loss of a binary layer, for `sicot index build --codes learned`; set it
        where an index with PCA codes recalls too little.
      code_balance: weight, within `codes`, of each bit being set for half of the photos; raise it
        where many bits are constant.
      code_quantisation: weight, within `codes`, of outputs close to 0 or 1; raise it where rounding
        loses recall.
      codes_shape_embedding: lets the binary layer's gradient into the embedding. Off, the
        recogniser is that of a run without codes; on, where search by codes matters more.
      background_suppression: weight of the background suppression loss of the box branch.
      box_area: weight, within `background_suppression`, of the log of the box's area; raise it
        where boxes come out too large, lower it where they cut products.
      box_regression: weight of the distance to the boxes of the manifest, where it has some.
      triplet: weight of the triplet loss between photos of a batch (Schroff et al. 2015).
      triplet_margin: its margin, in cosine similarity.

    Raises:
      ConfigError: a field outside its range, or fields that exclude each other.
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

    def __post_init__(self) -> None:
        check = FieldChecks("loss", self)
        check.finite()
        check.not_negative("visual", "mixed", "logit_adjustment", "tag_prediction")
        check.not_negative("codes", "code_balance", "code_quantisation")
        check.not_negative("background_suppression", "box_area", "box_regression", "triplet")
        if not 0 <= self.label_smoothing < 1:
            check.refuse("label_smoothing", "a share from 0 up to (not including) 1")
        if not (self.visual or self.mixed):
            raise ConfigError("loss.visual and loss.mixed are both 0; give at least one a weight")
        if self.codes_shape_embedding and not self.codes:
            raise ConfigError(
                "loss.codes_shape_embedding=True with loss.codes=0: there are no codes; give "
                "loss.codes a weight"
            )

    @property
    def with_text(self) -> bool:
        """Whether a loss term reads titles."""
        return self.with_semantic or bool(self.tag_prediction)

    @property
    def with_semantic(self) -> bool:
        """Whether there is a semantic stream."""
        return bool(self.mixed)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Sets how loss and update of the [C, D] classifier are computed: `head.*`.

    Attributes:
      kind: "class_sharded" (all classes, exactly), "sampled" (the labels' classes and a random
        share of the others), "knn" (the labels' classes and their nearest ones) or "dense" (the
        plain reference). The sampled ones save time where there are millions of classes.
      chunk: classes per block on a device; bounds the temporary memory at a few times chunk * (2 *
        batch + D) numbers. Lower it where a step runs out of memory.
      keep_logits: "no" computes the logits a second time for the gradient; "bfloat16" or "float32"
        keeps all logits of a step instead: one matrix product of four less, for 2 * batch * classes
        / devices numbers. Set it where that much memory is free.
      sample_rate: share of each device's classes that take part in a step, besides the classes of
        the labels ("sampled", "knn").
      neighbours: K, the nearest classes that the graph of "knn" holds for each class.
      rebuild_steps: steps between two builds of that graph; lower it where classes move quickly.

    Raises:
      ConfigError: a field outside its range.
    """

    kind: str = "class_sharded"
    chunk: int = 4096
    keep_logits: str = "no"
    sample_rate: float = 0.1
    neighbours: int = 64
    rebuild_steps: int = 1000

    def __post_init__(self) -> None:
        check = FieldChecks("head", self)
        check.choice("kind", HEAD_KINDS)
        check.choice("keep_logits", ("no", "bfloat16", "float32"))
        check.positive("chunk", "neighbours", "rebuild_steps")
        check.share("sample_rate", above_zero=True)

    @property
    def sampled(self) -> bool:
        """Whether a step sees a part of the classes only."""
        return self.kind in ("sampled", "knn")
