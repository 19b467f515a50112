"""Estimates the memory of a training step, and the bytes it sends, by item, from shapes alone.

Activations are added by `memory.fit`, from a compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from sicot_jax.classifier import knn_graph
from sicot_jax.classifier.memory import HeadSizes, head_temporary_bytes
from sicot_jax.classifier.state import stream_weights
from sicot_jax.common.trees import path_name
from sicot_jax.config import Config
from sicot_jax.parallel import gradient_sync, mesh
from sicot_jax.training.model import DataShape, compute_dtype, num_word_columns
from sicot_jax.training.optimizer import model_part, trained_parts
from sicot_jax.training.setup import check_batch_sizes, make_setup
from sicot_jax.training.state import abstract_state

# Share of a device's memory that a plan may use: the allocator leaves gaps, and programs and their
# constants live there too.
USABLE_SHARE = 0.95

MAX_CLASSES = 2**31 - 1  # class ids are int32


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Estimates what a training step holds in memory, in bytes of one device.

    Attributes:
      config: the run's.
      shape: sizes of its catalogue.
      devices: number of devices.
      platform: platform of the devices, as JAX calls it; "cpu" devices share their memory with the
        host.
      parameters: bytes of the streams' parameters and batch statistics, replicated on all devices.
      optimizer: bytes of the streams' optimizer state.
      gradient: bytes of the streams' gradient, of what is trained.
      residual: bytes of the gradient entries that a device has not sent yet, with
        `train.gradient_ratio` below 1.
      entries_sent: gradient entries that a device then sends per step.
      per_class: item -> bytes for each class of the device.
      width: D.
      num_moments: numbers in the batch statistics that a step computes (mean and variance of each
        batch norm that is trained).
      code_width: numbers of a photo that all devices compare its binary code by: bits and
        embedding; 0 without `loss.codes`.
      compared_width: width of the embeddings that `loss.background_suppression` or `loss.triplet`
        compare with those of all devices; 0 without both.
      activations: bytes of activations of `activations_photos` photos; None before a step is
        compiled. An evaluation of more photos than a micro-batch (eval.batch_size) is not in it.
      activations_photos: see `activations`.
      activations_backend: the backend that the step was compiled for.
    """

    config: Config
    shape: DataShape
    devices: int
    platform: str
    parameters: int
    optimizer: int
    gradient: int
    residual: int
    entries_sent: int
    per_class: dict[str, int]
    width: int
    num_moments: int
    code_width: int = 0
    compared_width: int = 0
    activations: int | None = None
    activations_photos: int = 1
    activations_backend: str = ""

    @property
    def shard_classes(self) -> int:
        """Classes of one device."""
        return -(-self.shape.num_classes // self.devices)

    @functools.cached_property
    def batch_size(self) -> int:
        """Photos of the largest batch of the run."""
        train, photos = self.config.train, self.shape.train_photos
        return train.batch_plan(photos).sizes(0, train.total_steps(photos))[-1]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the largest batch: one that grows has more of them."""
        return self.batch_size * self.config.train.micro_batches // self.config.train.batch_size

    @property
    def photos_per_device(self) -> int:
        """Photos of one device and step."""
        return -(-self.batch_size // self.devices)

    @property
    def micro_batch_per_device(self) -> int:
        """Photos of one device and micro-batch."""
        return -(-self.photos_per_device // self.micro_batches)

    @property
    def num_streams(self) -> int:
        """Streams with a loss through the classifier."""
        return len(stream_weights(self.config.loss))

    @property
    def num_embeddings(self) -> int:
        """Embeddings of a step: S * B."""
        return self.num_streams * self.batch_size

    @property
    def kernel_trains(self) -> bool:
        """Whether the classifier's kernel is trained."""
        return self.config.optim.trains("classifier/kernel")

    def state_bytes(self) -> dict[str, int]:
        """Returns what stays in memory from step to step: item -> bytes."""
        classifier = {
            f"classifier: {item}": size * self.shard_classes
            for item, size in self.per_class.items()
        }
        streams = {"streams: parameters": self.parameters, "streams: optimizer": self.optimizer}
        if self.residual:
            streams["streams: gradient not sent yet"] = self.residual
        return streams | classifier

    def batch_bytes(self) -> int:
        """Returns the bytes of a device's part of a batch."""
        size = self.config.preprocessing
        tokens = self.config.data.max_tokens if self.config.loss.with_text else 0
        box = 16 if self.config.loss.box_regression else 0
        photo = 3 * size.resize_height * size.resize_width + 4 * tokens + 4 + box
        return self.photos_per_device * photo

    def head_bytes(self) -> int:
        """Returns the bytes that the classifier head holds while it runs."""
        sizes = HeadSizes(
            num_streams=self.num_streams,
            batch=self.batch_size,
            width=self.width,
            shard_classes=self.shard_classes,
            devices=self.devices,
            itemsize=compute_dtype(self.config).itemsize,
            is_trained=self.kernel_trains,
            moments=self.per_class["optimizer"] // (4 * self.width),
        )
        running = head_temporary_bytes(self.config.head, sizes)
        return max(running, self._graph_bytes()) if self.config.head.kind == "knn" else running

    def _graph_bytes(self) -> int:
        """Bytes of building the graph of nearest classes; not while the rest of the head runs."""
        rows, k = self.shard_classes, self.config.head.neighbours
        itemsize = compute_dtype(self.config).itemsize
        queries, chunk = (
            knn_graph.equal_chunk_size(rows, most)
            for most in (knn_graph.GRAPH_QUERIES, knn_graph.GRAPH_CHUNK)
        )
        grouped = 4 * knn_graph.TOP_K_GROUP if chunk // knn_graph.TOP_K_GROUP > k else 0
        choice = 4 * queries * chunk + (grouped + 16) * queries * k
        best = 4 * rows * k  # cosines; the class ids are written to their final array
        part = itemsize * chunk * self.width
        widened = 4 * chunk * self.width
        if self.devices == 1:  # a part of the rows, as it is and normalised
            return best + part + max(widened, choice)
        parts = part + (widened if itemsize < 4 else 0)  # of a block; on CPU widened
        # A block and the next one.
        return best + choice + 2 * itemsize * rows * self.width + parts

    def temporary_bytes(self) -> dict[str, int]:
        """Returns what lives within a step, without activations: item -> bytes."""
        items = {
            "classifier: head, while it runs": self.head_bytes(),
            "streams: gradient": self.gradient,
        }
        if self.residual:
            items["streams: gradient plus entries not sent"] = self.residual
            items["streams: largest entries of all devices"] = 8 * self.entries_sent * self.devices
        micro_batch = self.micro_batch_per_device * self.devices
        pairs = self.micro_batch_per_device * micro_batch
        for item, width in (
            ("codes", self.code_width),
            ("boxes and triplets", self.compared_width),
        ):
            if width:
                name = f"{item}: of a micro-batch, and its pairs"
                items[name] = 4 * (micro_batch * width + 2 * pairs)
        if self.micro_batches > 1:
            items["streams: gradient"] *= 2  # of one micro-batch, and the sum
            items["batch, in order of micro-batches"] = self.batch_bytes()
        return items

    def held_outside_step(self) -> dict[str, int]:
        """Returns what is in memory while a step runs but not part of it: item -> bytes."""
        items = {"batch: the next one": self.batch_bytes()}
        if self.config.data.on_device:
            size = self.config.preprocessing
            photo = 3 * size.resize_height * size.resize_width
            items["photos: all of training"] = photo * self.shape.train_photos
        if self.platform == "cpu":  # accelerators copy to the host
            # Steps go on in new arrays while a save still writes the old ones; one save at a time.
            # Measured: 1.01 times a state of 787 MiB (resident 1298 MiB before the save, 2096 while
            # it is written).
            items["checkpoint: copy of the state"] = sum(self.state_bytes().values())
        return items

    def bytes_by_item(self) -> dict[str, int]:
        """Returns all items -> bytes; activations, where they are known, come last.

        Activations are in proportion to the photos of a micro-batch.

        Returns:
          Bytes of one device by item.
        """
        items = {
            **self.state_bytes(),
            **self.temporary_bytes(),
            "batch": self.batch_bytes(),
            **self.held_outside_step(),
        }
        if self.activations is not None:
            size = self.activations * self.micro_batch_per_device / self.activations_photos
            items[f"activations, compiled for {self.activations_backend}"] = round(size)
        return items

    def total_bytes(self) -> int:
        """Returns the bytes of all items."""
        return sum(self.bytes_by_item().values())

    def fits(self, memory: int) -> bool:
        """Returns whether the plan fits in a device's memory.

        Args:
          memory: bytes of a device.

        Returns:
          Whether the total is at most USABLE_SHARE of it.
        """
        return self.total_bytes() <= USABLE_SHARE * memory


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree.

    Args:
      tree: arrays, or their shapes and dtypes.

    Returns:
      Bytes.
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_memory_plan(
    config: Config, shape: DataShape, *, devices: int, platform: str
) -> MemoryPlan:
    """Estimates the memory of a config, without activations; allocates and compiles nothing.

    Args:
      config: the run's.
      shape: sizes of its catalogue.
      devices: number of devices, attached or not.
      platform: platform of the devices, as JAX calls it.

    Returns:
      The plan.

    Raises:
      ConfigError: batch or classes cannot be divided over the devices.
    """
    # Stands for a mesh of real devices.
    device_mesh: Any = AbstractMesh((devices, 1), mesh.AXES, axis_types=(AxisType.Explicit,) * 2)
    check_batch_sizes(config, device_mesh)
    with jax.sharding.use_abstract_mesh(device_mesh):
        state = abstract_state(make_setup(config, shape, device_mesh))
    classifier, params = state.classifier, state.params
    num_rows, width = classifier.weights.kernel.shape

    def bytes_per_class(*arrays: Any) -> int:
        return tree_bytes(mesh.split_per_class(arrays, num_rows)[0]) // num_rows

    vectors = classifier.weights, classifier.log_prior
    per_class = {
        "kernel, bias, prior": bytes_per_class(*vectors),
        "optimizer": bytes_per_class(classifier.opt_state),
    }
    if classifier.sampling:
        per_class["sampling"] = bytes_per_class(classifier.sampling)
    trained = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if config.optim.trains(path_name(path))
    ]
    parts = trained_parts(config.optim, params)
    code_head = params["visual"].get("code_head")
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.batch_stats)
        if parts[model_part(path_name(path))]
    ]
    compares = config.loss.background_suppression or config.loss.triplet
    return MemoryPlan(
        config=config,
        shape=shape,
        devices=devices,
        platform=platform,
        parameters=tree_bytes((params, state.batch_stats)),
        optimizer=tree_bytes(state.opt_state),
        gradient=tree_bytes(trained),
        residual=tree_bytes(state.residual) // devices,
        entries_sent=sum(
            gradient_sync.num_entries_sent(x.size // devices, config.train.gradient_ratio)
            for x in state.residual.values()
        ),
        per_class=per_class,
        width=width,
        num_moments=tree_bytes(moments) // 4,
        code_width=sum(code_head["kernel"].shape) if code_head else 0,
        compared_width=width - num_word_columns(config, shape) if compares else 0,
    )


def divides_batches(config: Config, devices: int) -> bool:
    """Returns whether batches can be divided over so many devices.

    Args:
      config: the run's.
      devices: number of devices.

    Returns:
      False where `setup.check_batch_sizes` would refuse.
    """
    return math.gcd(config.train.micro_batch_size, config.eval.batch_size) % devices == 0


def max_classes(plan: MemoryPlan, memory: int, *, devices: int) -> int:
    """Returns the largest number of classes that fits in memory, all else as planned.

    Args:
      plan: the plan.
      memory: bytes of a device.
      devices: number of devices.

    Returns:
      C, 0 where not even one class per device fits.
    """

    def fits(rows: int) -> bool:
        shape = dataclasses.replace(plan.shape, num_classes=rows * devices)
        return dataclasses.replace(plan, shape=shape, devices=devices).fits(memory)

    low, high = 0, MAX_CLASSES // devices + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * devices


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that crosses devices in a step.

    Attributes:
      kind: the collective, as XLA calls it.
      size: bytes that are gathered, scattered, summed or passed on.
      times: how often in a step.
    """

    kind: str
    size: int
    times: float = 1

    def bytes_sent(self, devices: int) -> float:
        """Returns the bytes that one device sends in a step, where all devices form a ring.

        Args:
          devices: number of devices.

        Returns:
          Bytes.
        """
        if devices == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return self.size * self.times * (devices - 1) / devices * passes


def step_collectives(plan: MemoryPlan) -> dict[str, Collective]:
    """Lists what crosses devices in a training step.

    Args:
      plan: the memory plan.

    Returns:
      Item -> collective.
    """
    head = _dense_head(plan) if plan.config.head.kind == "dense" else _sharded_head(plan)
    return _streams(plan) | _comparisons(plan) | head


def _streams(plan: MemoryPlan) -> dict[str, Collective]:
    # Mean and variance, forward once or twice, and their gradients.
    passes = 4 if plan.micro_batches == 1 else 6
    items = {
        "streams: gradient": Collective("all-reduce", plan.gradient - plan.residual),
        "streams: batch-norm statistics": Collective(
            "all-reduce", 4 * plan.num_moments // 2, plan.micro_batches * passes
        ),
    }
    if plan.residual:
        items["streams: largest entries of the gradient"] = Collective(
            "all-gather", 8 * plan.entries_sent * plan.devices
        )
    return items


def _comparisons(plan: MemoryPlan) -> dict[str, Collective]:
    """What losses that compare photos of different devices exchange."""
    items, photos = {}, plan.batch_size
    if plan.code_width:
        bits = 4 * photos * plan.config.model.code_bits
        items["codes: bits and embeddings"] = Collective("all-gather", 4 * photos * plan.code_width)
        items["codes: cotangents"] = Collective("all-reduce", bits)
    if plan.compared_width:
        compared = 4 * photos * plan.compared_width
        items["boxes and triplets: embeddings"] = Collective("all-gather", compared)
        if plan.config.loss.triplet:  # background embeddings are compared with constants
            items["triplets: cotangents"] = Collective("all-reduce", compared)
    return items


def _dense_head(plan: MemoryPlan) -> dict[str, Collective]:
    kernel = 4 * (plan.width + 1) * plan.shard_classes * plan.devices
    items = {"classifier: kernel and bias": Collective("all-gather", kernel)}
    if plan.kernel_trains:
        items["classifier: gradient of each stream"] = Collective(
            "all-reduce", kernel, plan.num_streams
        )
    return items


def _sharded_head(plan: MemoryPlan) -> dict[str, Collective]:
    parts, photos, rows = plan.micro_batches, plan.batch_size, plan.num_embeddings
    embeddings = 4 * rows * plan.width
    items = {
        "classifier: embeddings": Collective(
            "all-gather", embeddings, 1 if parts == 1 else (parts + 1) / parts
        ),
        "classifier: labels": Collective("all-gather", 4 * photos),
        "classifier: cotangents": Collective("reduce-scatter", embeddings),
        "classifier: maxima, sums, label logits": Collective("all-reduce", 4 * rows, 3),
    }
    head = plan.config.head
    if head.kind == "knn":
        block = compute_dtype(plan.config).itemsize * plan.width * plan.shard_classes
        items["classifier: neighbours of labels"] = Collective(
            "all-reduce", 4 * photos * head.neighbours
        )
        items["classifier: rows, for the graph"] = Collective(
            "collective-permute", block, (plan.devices - 1) / head.rebuild_steps
        )
    return items
