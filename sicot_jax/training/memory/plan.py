"""Bytes that a device holds and sends in a step, by item, from shapes alone; activations are added
by `fit`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from sicot_jax.classifier import heads
from sicot_jax.classifier import sampling as sampled
from sicot_jax.common.trees import path_name
from sicot_jax.config import Config
from sicot_jax.parallel import gradient_sync
from sicot_jax.parallel import mesh
from sicot_jax.training.optimizer import model_part, trained_parts
from sicot_jax.training.state import abstract_state
from sicot_jax.training.setup import check_batch_sizes, make_setup
from sicot_jax.training.model import DataShape, compute_dtype, num_word_columns

# Of a device's memory that a plan may take: the allocator leaves gaps, and programs and their
# constants live there too.
SHARE = 0.95

MOST_CLASSES = 2**31 - 1  # class ids are int32


@dataclasses.dataclass(frozen=True)
class Message:
    """One array that crosses devices: `size` bytes are gathered, scattered, summed or passed on,
    `times` a step.
    """

    kind: str  # as XLA calls it
    size: int
    times: float = 1

    def sent(self, devices: int) -> float:
        """Bytes that one device sends in a step, where all devices form a ring."""
        if devices == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.times
        return (
            self.size
            * self.times
            * (devices - 1)
            / devices
            * (2 if self.kind == "all-reduce" else 1)
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step holds and sends; bytes of one device.

    parameters, optimizer, gradient: of the streams, whole on every device; the gradient is that of
      what trains.
    unsent: what a device keeps of kernels' gradients with `train.gradient_ratio` below 1;
      `entries_sent` of them it sends.
    per_class: item -> bytes for each class of the device.
    width: D.
    moments: numbers in the batch statistics that a step computes (mean and variance of each batch
      norm that trains).
    code_width: numbers of a photo that all devices compare its code by: bits and embedding; 0
      without `loss.codes`.
    compared_width: of the embeddings that `loss.background_suppression` or `loss.triplet` compare with those of all
      devices; 0 without both.
    platform: of the devices, as JAX calls it; "cpu" devices share their memory with the host.
    activations: of `activations_of` photos at a time, on the backend `compiled_for`; None before a
      step is compiled.
      Those of training: an evaluation of more photos at a time than a micro-batch has
        (eval.batch_size) is not in it.
    """

    config: Config
    shape: DataShape
    devices: int
    platform: str
    parameters: int
    optimizer: int
    gradient: int
    unsent: int
    entries_sent: int
    per_class: dict[str, int]
    width: int
    moments: int
    code_width: int = 0
    compared_width: int = 0
    activations: int | None = None
    activations_of: int = 1
    compiled_for: str = ""

    @property
    def shard_classes(self) -> int:
        return -(-self.shape.num_classes // self.devices)

    @functools.cached_property
    def batch_size(self) -> int:
        """Photos of the largest batch of the run."""
        train, photos = self.config.train, self.shape.train_photos
        return train.batch_plan(photos).sizes(0, train.total_steps(photos))[-1]

    @property
    def micro_batches(self) -> int:
        """Of the largest batch: one that grows has the more of them."""
        return self.batch_size * self.config.train.micro_batches // self.config.train.batch_size

    @property
    def photos(self) -> int:
        """Of one device and step."""
        return -(-self.batch_size // self.devices)

    @property
    def photos_at_a_time(self) -> int:
        return -(-self.photos // self.micro_batches)

    @property
    def streams(self) -> int:
        """With a loss."""
        return len(heads.loss_weights(self.config.loss))

    @property
    def rows(self) -> int:
        """Embeddings of a step."""
        return self.streams * self.batch_size

    @property
    def kernel_trains(self) -> bool:
        return self.config.optim.trains("classifier/kernel")

    def state(self) -> dict[str, int]:
        """Item -> bytes that stay from step to step."""
        classifier = {
            f"classifier: {item}": size * self.shard_classes
            for item, size in self.per_class.items()
        }
        streams = {"streams: parameters": self.parameters, "streams: optimizer": self.optimizer}
        if self.unsent:
            streams["streams: gradient not sent yet"] = self.unsent
        return streams | classifier

    def batch(self) -> int:
        side = self.config.preprocessing
        tokens = self.config.data.max_tokens if self.config.loss.with_text else 0
        box = 16 if self.config.loss.box_regression else 0
        return self.photos * (3 * side.resize_height * side.resize_width + 4 * tokens + 4 + box)

    def head(self) -> int:
        """What the head holds while it runs."""
        running = heads.temporary_bytes(
            self.config.head,
            streams=self.streams,
            batch=self.batch_size,
            width=self.width,
            shard_classes=self.shard_classes,
            devices=self.devices,
            itemsize=compute_dtype(self.config).itemsize,
            trains=self.kernel_trains,
            moments=self.per_class["optimizer"] // (4 * self.width),
        )
        return max(running, self._graph()) if self.config.head.kind == "knn" else running

    def _graph(self) -> int:
        """What building the graph of neighbours holds; not at the same time as the rest of the
        head.
        """
        rows, k, number = (
            self.shard_classes,
            self.config.head.neighbours,
            compute_dtype(self.config).itemsize,
        )
        queries, chunk = (
            sampled.equal_chunks(rows, most)
            for most in (sampled.GRAPH_QUERIES, sampled.GRAPH_CHUNK)
        )
        grouped = 4 * sampled.TOP_K_GROUP if chunk // sampled.TOP_K_GROUP > k else 0
        choice = 4 * queries * chunk + (grouped + 16) * queries * k
        best = 4 * rows * k  # cosines, for the classes are written to their place
        part = number * chunk * self.width
        wide = 4 * chunk * self.width
        if self.devices == 1:  # a part of the rows, as it is and normalised
            return best + part + max(wide, choice)
        parts = part + (wide if number < 4 else 0)  # of a block; on CPU widened
        return best + choice + 2 * number * rows * self.width + parts  # a block and the next one

    def temporary(self) -> dict[str, int]:
        """Item -> bytes that live within a step, without activations."""
        items = {"classifier: head, while it runs": self.head(), "streams: gradient": self.gradient}
        if self.unsent:
            items["streams: gradient and what waited of it"] = self.unsent
            items["streams: largest entries of all devices"] = 8 * self.entries_sent * self.devices
        at_a_time = self.photos_at_a_time * self.devices
        pairs = self.photos_at_a_time * at_a_time
        for item, width in (
            ("codes", self.code_width),
            ("boxes and triplets", self.compared_width),
        ):
            if width:
                items[f"{item}: of all photos at a time, and of pairs"] = 4 * (
                    at_a_time * width + 2 * pairs
                )
        if self.micro_batches > 1:
            items["streams: gradient"] *= 2  # of one micro-batch, and the sum
            items["batch, in order of micro-batches"] = self.batch()
        return items

    def beside_step(self) -> dict[str, int]:
        """Item -> bytes that are held while a step runs, and are not the step's."""
        items = {"batch: the next one": self.batch()}
        if self.config.data.on_device:
            side = self.config.preprocessing
            items["photos: all of training"] = (
                3 * side.resize_height * side.resize_width * self.shape.train_photos
            )
        if self.platform == "cpu":  # accelerators copy to the host
            # Steps go on in new arrays while a save still writes the old ones; one save at a time.
            # Measured: 1.01 times a state of 787 MiB (resident 1298 MiB before the save, 2096 while
            # it is written).
            items["checkpoint: copy of the state"] = sum(self.state().values())
        return items

    def memory(self) -> dict[str, int]:
        """Item -> bytes; activations last, where they are known, in proportion to the photos at a
        time.
        """
        items = {**self.state(), **self.temporary(), "batch": self.batch(), **self.beside_step()}
        if self.activations is not None:
            now = round(self.activations * self.photos_at_a_time / self.activations_of)
            items[f"activations, compiled for {self.compiled_for}"] = now
        return items

    def total(self) -> int:
        return sum(self.memory().values())

    def fits(self, memory: int) -> bool:
        return self.total() <= SHARE * memory

    def messages(self) -> dict[str, Message]:
        """Item -> what crosses devices in a step."""
        config, width = self.config, self.width
        photos, parts = self.batch_size, self.micro_batches
        passes = (
            4 if parts == 1 else 6
        )  # mean and variance, forward once or twice, and their gradients
        streams = {
            "streams: gradient": Message("all-reduce", self.gradient - self.unsent),
            "streams: batch-norm statistics": Message(
                "all-reduce", 4 * self.moments // 2, parts * passes
            ),
        }
        if self.unsent:
            streams["streams: largest entries of the gradient"] = Message(
                "all-gather", 8 * self.entries_sent * self.devices
            )
        if self.code_width:
            bits = 4 * photos * config.model.code_bits
            streams["codes: bits and embeddings"] = Message(
                "all-gather", 4 * photos * self.code_width
            )
            streams["codes: cotangents"] = Message("all-reduce", bits)
        if self.compared_width:
            compared = 4 * photos * self.compared_width
            streams["boxes and triplets: embeddings"] = Message("all-gather", compared)
            if config.loss.triplet:  # what is outside of a box is compared with constants
                streams["triplets: cotangents"] = Message("all-reduce", compared)
        if config.head.kind == "dense":
            kernel = 4 * (width + 1) * self.shard_classes * self.devices
            gathered = {"classifier: kernel and bias": Message("all-gather", kernel)}
            gradient = {
                "classifier: gradient of each stream": Message("all-reduce", kernel, self.streams)
            }
            return streams | gathered | (gradient if self.kernel_trains else {})
        items = streams | {
            "classifier: embeddings": Message(
                "all-gather", 4 * self.rows * width, 1 if parts == 1 else (parts + 1) / parts
            ),
            "classifier: labels": Message("all-gather", 4 * photos),
            "classifier: cotangents": Message("reduce-scatter", 4 * self.rows * width),
            "classifier: maxima, sums, label logits": Message("all-reduce", 4 * self.rows, 3),
        }
        if config.head.kind == "knn":
            block = compute_dtype(config).itemsize * width * self.shard_classes
            passed = (self.devices - 1) / config.head.rebuild_steps
            items["classifier: neighbours of labels"] = Message(
                "all-reduce", 4 * photos * config.head.neighbours
            )
            items["classifier: rows, for the graph"] = Message("collective-permute", block, passed)
        return items


def size_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_plan(config: Config, shape: DataShape, *, devices: int, platform: str) -> Plan:
    """The plan of a config on that many devices, whether they are here or not. Nothing is allocated
    or compiled.

    Raises ConfigError where batch or classes cannot be divided over the devices.
    """
    device_mesh = AbstractMesh((devices, 1), mesh.AXES, axis_types=(AxisType.Explicit,) * 2)
    check_batch_sizes(config, device_mesh)
    with jax.sharding.use_abstract_mesh(device_mesh):
        state = abstract_state(make_setup(config, shape, device_mesh))
    classifier, params = state.classifier, state.params
    count, width = classifier.kernel.shape

    def each_class(*arrays: Any) -> int:
        return size_of(mesh.split_per_class(arrays, count)[0]) // count

    per_class = {
        "kernel, bias, prior": each_class(classifier.kernel, classifier.bias, classifier.log_prior),
        "optimizer": each_class(classifier.opt_state),
    }
    if classifier.sampling:
        per_class["sampling"] = each_class(classifier.sampling)
    trained = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if config.optim.trains(path_name(path))
    ]
    parts = trained_parts(config.optim, params)
    codes = params["visual"].get("code_head")
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.batch_stats)
        if parts[model_part(path_name(path))]
    ]
    return Plan(
        config=config,
        shape=shape,
        devices=devices,
        platform=platform,
        parameters=size_of((params, state.batch_stats)),
        optimizer=size_of(state.opt_state),
        gradient=size_of(trained),
        unsent=size_of(state.residual) // devices,
        entries_sent=sum(
            gradient_sync.num_entries_sent(x.size // devices, config.train.gradient_ratio)
            for x in state.residual.values()
        ),
        per_class=per_class,
        width=width,
        moments=size_of(moments) // 4,
        code_width=sum(codes["kernel"].shape) if codes else 0,
        compared_width=width - num_word_columns(config, shape)
        if config.loss.background_suppression or config.loss.triplet
        else 0,
    )


def can_divide(config: Config, devices: int) -> bool:
    """Whether that many devices can divide the batches among them (what `step.check_batch_sizes`
    refuses otherwise).
    """
    return (
        math.gcd(config.train.batch_size // config.train.micro_batches, config.eval.batch_size)
        % devices
        == 0
    )


def largest_classes(plan: Plan, memory: int, *, devices: int) -> int:
    """The largest number of classes that fits that many devices of `memory` bytes, all else as
    planned; 0 for none.
    """

    def fits(rows: int) -> bool:
        shape = dataclasses.replace(plan.shape, num_classes=rows * devices)
        return dataclasses.replace(plan, shape=shape, devices=devices).fits(memory)

    low, high = 0, MOST_CLASSES // devices + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * devices
