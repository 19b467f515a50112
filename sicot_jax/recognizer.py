"""Recognises photos from Python, with JAX or ONNX Runtime behind one interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, overload

import numpy as np

from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.common.text import one_line_error
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.weights.bundle import (
    ONNX_FILE,
    STABLEHLO_FILE,
    WEIGHTS_FILE,
    RecognizerSpec,
    WeightsBundle,
    is_bundle,
    read_bundle,
    read_bundle_classes,
    written_with,
)

if TYPE_CHECKING:
    from PIL import Image

# A file, its bytes, uint8 [H, W, 3], or a Pillow image.
Photo: TypeAlias = "str | Path | bytes | np.ndarray | Image.Image"
MAX_BATCH = 32
_CPU_PROVIDER = "CPUExecutionProvider"
# What builds of ONNX Runtime for GPUs offer. Others, such as "AzureExecutionProvider", are no
# device of this machine.
_GPU_PROVIDERS = (
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
)


@dataclasses.dataclass(frozen=True)
class Match:
    """A product that a photo may show.

    Attributes:
      class_id: Its class in the classifier.
      sku: Its SKU.
      title: Its title.
      probability: Its probability among all products that are not discontinued.
    """

    class_id: int
    sku: str
    title: str
    probability: float


class EngineOutputs(NamedTuple):
    """What an engine computes from B photos.

    Attributes:
      embedding: Float32 [B, D], not normalised.
      logits: Float32 [B, C].
      box: Box of the product, float32 [B, 4]: left, top, right, bottom as fractions of the photo
        that the engine was given. None for a model without a localisation branch.
    """

    embedding: np.ndarray
    logits: np.ndarray
    box: np.ndarray | None = None

    def per_photo(self) -> Iterator[EngineOutputs]:
        """Iterates over photos.

        Yields:
          Embedding [D], logits [C] and box [4] of each.

        Raises:
          ValueError: The arrays are of different lengths.
        """
        boxes = [None] * len(self.logits) if self.box is None else self.box
        return map(EngineOutputs._make, zip(self.embedding, self.logits, boxes, strict=True))


class Engine(Protocol):
    """Runs a recogniser on a batch of prepared photos."""

    def __call__(self, photos: np.ndarray) -> EngineOutputs:
        """Computes embeddings, logits and boxes.

        Args:
          photos: Uint8 [B, height, width, 3].

        Returns:
          The outputs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DeviceEngine:
    """An engine that says where it runs.

    Attributes:
      run: Computes the outputs.
      provider: What runs it: JAX's platform, "cpu", "gpu" or "tpu", or ONNX Runtime's execution
        provider, such as "CUDAExecutionProvider".
      fallback: Why it runs on the CPU although this machine's packages were made for more; ""
        where it does not.
    """

    run: Engine
    provider: str
    fallback: str = ""

    def __call__(self, photos: np.ndarray) -> EngineOutputs:
        """Computes embeddings, logits and boxes; see `Engine`."""
        return self.run(photos)

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator runs it."""
        return self.provider in ("cpu", _CPU_PROVIDER)


class Recognizer:
    """Recognises and embeds photos; `sicot_jax.load` makes one.

    Attributes:
      engine: Runs the network.
      preprocessing: How a photo becomes its input.
      classes: The product of each class.
    """

    def __init__(self, engine: Engine, preprocessing: Preprocessing, classes: ClassTable):
        """Builds a recogniser.

        Args:
          engine: Runs the network.
          preprocessing: How a photo becomes its input.
          classes: The product of each class.
        """
        self.engine, self.preprocessing, self.classes = engine, preprocessing, classes

    # A str is a sequence of str too; it counts as one photo.
    @overload
    def recognize(  # type: ignore[overload-overlap]
        self, photos: Photo, k: int = 5
    ) -> list[Match]: ...
    @overload
    def recognize(self, photos: Sequence[Photo], k: int = 5) -> list[list[Match]]: ...

    def recognize(self, photos: Any, k: int = 5) -> Any:
        """Returns the most probable products of one photo or of several.

        Discontinued products are left out. At most `MAX_BATCH` photos are on the device at a time.

        Args:
          photos: A photo (file, bytes, uint8 [H, W, 3] or Pillow image), or a sequence of them.
          k: Number of products; fewer where the recogniser knows fewer.

        Returns:
          Matches of the photo, most probable first; a list of such lists for a sequence.

        Raises:
          InputError: A photo cannot be decoded, or k is below 1.

        Examples:
          >>> import tempfile
          >>> import numpy as np
          >>> import sicot_jax
          >>> from sicot_jax.weights.untrained import write_untrained_bundle
          >>> recognizer = sicot_jax.load(write_untrained_bundle(tempfile.mkdtemp()))
          >>> photo = np.zeros((64, 48, 3), np.uint8)
          >>> matches = recognizer.recognize(photo, k=2)
          >>> len(matches), matches[0].probability >= matches[1].probability
          (2, True)
          >>> [len(matches) for matches in recognizer.recognize([photo, photo], k=3)]
          [3, 3]
        """
        if k < 1:
            raise InputError(f"k={k}, wanted 1 or more")
        active = np.flatnonzero(~np.asarray(self.classes.discontinued, bool))
        k = min(k, len(active))
        batch = _as_sequence(photos)
        matches = []
        for outputs in self._run(batch):
            top, probability = _top_k(outputs.logits[:, active], k)
            rows = zip(active[top].tolist(), probability.tolist(), strict=True)
            matches += [list(map(self._match, *row)) for row in rows]
        return matches if batch is photos else matches[0]

    def embed(self, photos: Photo | Sequence[Photo]) -> np.ndarray:
        """Returns the embeddings of one photo or of several, the input of the classifier.

        Args:
          photos: A photo (file, bytes, uint8 [H, W, 3] or Pillow image), or a sequence of them.

        Returns:
          Float32 [D] for one photo, [N, D] for a sequence; not normalised.

        Raises:
          InputError: A photo cannot be decoded.

        Examples:
          >>> import tempfile
          >>> import numpy as np
          >>> import sicot_jax
          >>> from sicot_jax.weights.untrained import write_untrained_bundle
          >>> recognizer = sicot_jax.load(write_untrained_bundle(tempfile.mkdtemp()))
          >>> photo = np.zeros((64, 48, 3), np.uint8)
          >>> recognizer.embed(photo).shape, recognizer.embed([photo, photo]).shape
          ((16,), (2, 16))
        """
        batch = _as_sequence(photos)
        embeddings = np.concatenate([outputs.embedding for outputs in self._run(batch)])
        return embeddings if batch is photos else embeddings[0]

    def _match(self, class_id: int, probability: float) -> Match:
        return Match(
            class_id, self.classes.sku[class_id], self.classes.title[class_id], probability
        )

    def _run(self, photos: Sequence[Photo]) -> Iterator[EngineOutputs]:
        if not len(photos):
            raise InputError("no photo, wanted one or more")
        for start in range(0, len(photos), MAX_BATCH):
            batch = [self._load(photo) for photo in photos[start : start + MAX_BATCH]]
            yield self.engine(self.preprocessing.centre_crop(np.stack(batch)))

    def _load(self, photo: Any) -> np.ndarray:
        if isinstance(photo, (str, Path)):
            try:
                return self.preprocessing.load(Path(photo).read_bytes())
            except OSError as error:
                raise InputError(f"{photo}: {error.strerror}; wanted a photo's file") from error
        if _is_pillow_image(photo):
            from sicot_jax.common import image

            photo = image.photo_pixels(photo)
        if isinstance(photo, np.ndarray) and (
            photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size
        ):
            raise InputError(
                f"a photo is {photo.dtype} {photo.shape}, wanted uint8 [height, width, 3], RGB"
            )
        if not isinstance(photo, (bytes, np.ndarray)):
            raise InputError(
                f"a photo is {type(photo).__name__}, "
                "wanted a file, bytes, uint8 [height, width, 3] or a Pillow image"
            )
        return self.preprocessing.load(photo)


def _top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices and softmax probabilities of the k greatest logits of each row."""
    candidates = np.argpartition(-logits, k - 1, 1)[:, :k]
    order = np.argsort(-np.take_along_axis(logits, candidates, 1), 1, kind="stable")
    top = np.take_along_axis(candidates, order, 1)
    greatest = logits.max(1, keepdims=True)
    total = np.exp(logits - greatest, dtype=np.float64).sum(1, keepdims=True)
    return top, np.exp(np.take_along_axis(logits, top, 1) - greatest) / total


def _is_pillow_image(photo: Any) -> bool:
    return hasattr(photo, "getexif")  # without importing Pillow


def _as_sequence(photos: Any) -> Sequence[Photo]:
    """Returns the argument itself where it is several photos, else a list of the one."""
    is_one = isinstance(photos, (str, Path, bytes)) or _is_pillow_image(photos)
    is_one = is_one or (isinstance(photos, np.ndarray) and photos.ndim <= 3)
    if not is_one and not hasattr(photos, "__getitem__"):
        raise InputError(f"photos are {type(photos).__name__}, wanted one photo or a list of them")
    return [photos] if is_one else photos


def load_recognizer(path: str | Path) -> Recognizer:
    """Loads the recogniser of a run folder or of a weights bundle; see `sicot_jax.load`.

    Args:
      path: Run folder, or folder of `sicot convert`.

    Returns:
      The recogniser, on ONNX Runtime where the folder holds a graph, else on JAX.

    Raises:
      InputError: The folder is neither, the run is not finished, or a file was changed.
    """
    path = Path(path)
    if is_bundle(path):
        bundle = read_bundle(path)
        engine = onnx_engine(path) if (path / ONNX_FILE).exists() else jax_engine(bundle)
        return Recognizer(engine, bundle.preprocessing, read_bundle_classes(bundle))
    from sicot_jax.export.from_run import export_run

    with export_run(path) as exported:
        arrays = exported.arrays | exported.host_class_arrays()
    engine = compile_engine(exported.model, exported.preprocessing, arrays)
    return Recognizer(engine, exported.preprocessing, read_class_table(exported.class_table))


def jax_engine(bundle: WeightsBundle) -> DeviceEngine:
    """Builds a JAX engine from the weights of a bundle, with batch norms folded.

    Args:
      bundle: Bundle of `sicot convert to-torch` or of an index.

    Returns:
      The engine, on the first device.

    Raises:
      InputError: The bundle has no classifier, or holds a StableHLO program.
    """
    import safetensors.numpy

    if not bundle.model.num_classes:
        raise InputError(
            f"{bundle.folder}: weights without a classifier; train from them (model.init_from)"
        )
    if (bundle.folder / STABLEHLO_FILE).exists():
        raise InputError(
            f"{bundle.folder}: StableHLO is loaded by jax.export; "
            "give the run folder, or one of to-torch"
        )
    arrays = safetensors.numpy.load_file(bundle.folder / WEIGHTS_FILE)
    return compile_engine(bundle.model, bundle.preprocessing, arrays)


def compile_engine(
    spec: RecognizerSpec, preprocessing: Preprocessing, arrays: Mapping[str, np.ndarray]
) -> DeviceEngine:
    """Builds a JAX engine from arrays, with batch norms folded.

    It compiles a program for each power of two, up to which batches are padded.

    Args:
      spec: Architecture.
      preprocessing: Normalisation of the input.
      arrays: Weights by torch's names, "fc.weight" and "fc.bias" among them.

    Returns:
      The engine, on the first device.
    """
    import jax

    from sicot_jax.classifier.class_weights import ClassWeights
    from sicot_jax.weights.batch_norm_folding import fold_batch_norms, folded_forward

    class_weights = ClassWeights.from_named_arrays(arrays)
    device = jax.devices()[0]
    weights = jax.device_put(
        {
            **fold_batch_norms(arrays),
            "kernel": class_weights.kernel.T,
            "bias": class_weights.bias,
        },
        device,
    )

    @jax.jit
    def forward(weights: Any, photos: Any) -> EngineOutputs:
        embedding, box = folded_forward(spec, weights, preprocessing.normalize(photos))
        logits = embedding @ weights["kernel"] + weights["bias"]
        return EngineOutputs(embedding, logits, box)  # type: ignore[arg-type]

    def engine(photos: np.ndarray) -> EngineOutputs:
        count = len(photos)
        padded = np.zeros((1 << (count - 1).bit_length(), *photos.shape[1:]), np.uint8)
        padded[:count] = photos
        return jax.tree.map(lambda array: np.asarray(array)[:count], forward(weights, padded))

    return DeviceEngine(engine, device.platform)


def onnx_engine(folder: Path, *, threads: int = 0) -> DeviceEngine:
    """Builds an ONNX Runtime engine from the graph of a bundle.

    Args:
      folder: Folder of `sicot convert to-onnx`.
      threads: Number of cores to use; 0 for all.

    Returns:
      The engine.

    Raises:
      InputError: ONNX Runtime is not installed or cannot read the graph, or the graph gives no
        logits.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"{folder}: no onnxruntime here; install it: pip install 'sicot_jax[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads sleep: spinning ones hold cores that photos are decoded on (a fifth more photos
    # a second).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    available = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(
            str(folder / ONNX_FILE), options, providers=available
        )
    except Exception as error:  # its exceptions have no common base
        raise InputError(
            f"{folder}: ONNX Runtime {onnxruntime.__version__} cannot load the graph "
            f"({one_line_error(error, 160)}), written with {written_with(folder, 'onnxruntime')}; "
            "install that version or a newer one, or convert again"
        ) from error
    outputs = [output.name for output in session.get_outputs()]
    if "logits" not in outputs:
        raise InputError(
            f"{folder}: a graph with its best classes inside; "
            "convert without --top-k to load it here"
        )
    names = [name for name in EngineOutputs._fields if name in outputs]
    return DeviceEngine(
        lambda photos: EngineOutputs(
            **dict(zip(names, session.run(names, {"photos": photos}), strict=True))
        ),
        *_provider_in_use(available, session.get_providers()),
    )


def _provider_in_use(available: Sequence[str], used: Sequence[str]) -> tuple[str, str]:
    """Returns the provider that computes, and why it is the CPU where a GPU's was available.

    ONNX Runtime goes on without a provider whose libraries or device are missing, and says so on
    standard error alone.

    Args:
      available: Providers that the installed package was built with.
      used: Providers of a session, first choice first.
    """
    provider = next((name for name in used if name in _GPU_PROVIDERS), _CPU_PROVIDER)
    wanted = [name for name in available if name in _GPU_PROVIDERS]
    if provider != _CPU_PROVIDER or not wanted:
        return provider, ""
    return provider, (
        f"ONNX Runtime could not start {' or '.join(wanted)} and runs on the CPU; see its lines "
        "above: often CUDA's or cuDNN's libraries of another version, or no visible GPU"
    )
