"""Training that starts from what was learned before (`model.init_from`): a run, or converted weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax import class_sharded, evaluate, hosts, mesh, pipeline, runs
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.strings import counted
from sicot_jax.catalog.tables import read_class_table
from sicot_jax.checkpoint import CheckpointError, differences, shapes
from sicot_jax.config import ConfigError
from sicot_jax.convert import folder as folders
from sicot_jax.convert import network, text
from sicot_jax.convert.names import mismatches
from sicot_jax.heads import Classifier
from sicot_jax.step import Setup, TrainState, words_shared

PHOTOS_OF_A_NEW_CLASS = 16  # that its row is made of
PHOTOS_OF_ALL = 2048  # whose mean its own is set against


@dataclasses.dataclass(frozen=True)
class Learned:
    """What is there to start from. `skus` of the rows of the classifier, which is None where there is none."""

    what: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    classifier: Classifier | None
    skus: Sequence[str]
    vocabulary: str
    word_rows: bool  # whether the classifier's rows end in shares of words


def warm_start(state: TrainState, setup: Setup, catalog: Catalog) -> TrainState:
    """`state` with the streams of `model.init_from`, and the classifier's rows of the products that both have.

    What belongs to words is taken only where the vocabulary is the same: ids of another one mean other words. What rows
    share through titles stays the catalogue's (`word_rows`); where the scores are not taken, rows come with what they shared.
    A product that is new gets a row from its photos (`imprinted`); one that is gone leaves none.
    Raises CheckpointError naming parameters of another shape.
    """
    config = setup.config
    learned = _learned(Path(config.model.init_from), state, setup, catalog)
    same_words = learned.vocabulary == runs.vocabulary_hash(catalog)
    params, batch_stats = ({**mine} for mine in (state.params, state.batch_stats))
    for stream in state.params.keys() & learned.params.keys():
        params[stream], batch_stats[stream] = learned.params[stream], learned.batch_stats[stream]
    if "semantic" in state.params and "semantic" in learned.params and not same_words:
        hosts.say(f"{learned.what}: another vocabulary; word vectors are the catalogue's own")
        params["semantic"] = {**params["semantic"], "words": state.params["semantic"]["words"]}
    with_scores = same_words and all("to_words" in s.params["visual"] for s in (state, learned))
    if not with_scores:
        own_scores = {name: x for name, x in state.params["visual"].items() if name == "to_words"}
        theirs = {name: x for name, x in params["visual"].items() if name != "to_words"}
        params["visual"] = theirs | own_scores
    if faults := differences(shapes(params), shapes(state.params)):
        raise CheckpointError(f"{learned.what}: another model: {faults}")
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats)
    if learned.classifier is None:
        return state
    both = config.model.word_rows and learned.word_rows and with_scores
    classifier = learned.classifier if both else evaluate.plain_classifier(learned)
    return _with_rows(state, classifier, learned, setup, catalog)


def _learned(path: Path, state: TrainState, setup: Setup, catalog: Catalog) -> Learned:
    what = f"model.init_from={path}"
    if folders.is_converted(path):
        return _from_converted(path, what, state, setup)
    run = runs.read_run(path)
    source_setup, source, trained = runs.restore_best(run, setup.mesh)
    if trained < source_setup.steps:
        hosts.say(f"{what}: a run trained for {trained} of {source_setup.steps} steps")
    same = run.class_table == evaluate.class_table_hash(catalog)
    skus = catalog.classes.sku if same else read_class_table(runs.class_table_file(run)).sku
    rows_share_words = run.config.model.word_rows
    return Learned(what, source.params, source.batch_stats, source.classifier, skus, run.vocabulary, rows_share_words)


def _from_converted(path: Path, what: str, state: TrainState, setup: Setup) -> Learned:
    """The streams and, where there is one, the classifier of a folder of `sicot convert`.

    A projection that the weights do not have stays as it is; mean and deviation of the photos have to be the weights' own.
    """
    import safetensors

    converted, config = folders.read_converted(path), setup.config
    for name in ("mean", "std"):
        theirs, mine = getattr(converted.preprocessing, name), getattr(config.preprocessing, name)
        if not np.allclose(theirs, mine, atol=1e-6):
            raise ConfigError(
                f"{what}: its photos had preprocessing.{name}={theirs}, the config has {mine}; set "
                f"--config.preprocessing.{name}={','.join(map(str, theirs))}"
            )
    params, stats = state.params["visual"], state.batch_stats["visual"]
    with safetensors.safe_open(path / folders.WEIGHTS, framework="numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        rows = {name: found.pop(name) for name in ("fc.weight", "fc.bias") if name in found}
        wanted = network.shapes_of(params, stats)
        if not converted.model.embedding_width:
            wanted = {name: shape for name, shape in wanted.items() if not name.startswith("projection")}
        if faults := mismatches(found, wanted):
            raise CheckpointError(
                f"{what}: a ResNet-{converted.model.depth} of width {converted.model.width}, and model.depth="
                f"{config.model.depth}, model.width={config.model.width} want other arrays: {faults[:600]}"
            )
        arrays = {name: file.get_tensor(name) for name in found}
        params, stats = mesh.copy_to_all([network.filled(tree, arrays) for tree in (params, stats)], setup.mesh)
        classifier = None
        if rows:
            bias = mesh.padded_rows(rows["fc.bias"], file.get_slice("fc.bias"), setup.mesh)
            kernel = mesh.padded_rows(rows["fc.weight"], file.get_slice("fc.weight"), setup.mesh)
            classifier = Classifier(kernel, bias, jnp.zeros_like(bias), (), {})
    skus = read_class_table(path / folders.CLASSES).sku if rows else []
    streams, vocabulary = {"visual": (params, stats)}, ""
    if converted.text is not None and "semantic" in state.params:
        streams["semantic"], vocabulary = _semantic(path, what, state, setup), converted.text.vocabulary
    all_params, all_stats = ({name: stream[i] for name, stream in streams.items()} for i in range(2))
    return Learned(what, all_params, all_stats, classifier, skus, vocabulary, word_rows=False)


def _semantic(path: Path, what: str, state: TrainState, setup: Setup) -> Any:
    """Params and batch statistics of the folder's semantic stream; its word table may be of another vocabulary."""
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(path / folders.TEXT)
    mine = state.params["semantic"], state.batch_stats["semantic"]
    found, wanted = (
        {n: a.shape for n, a in some.items() if n != "words.weight"} for some in (arrays, text.arrays_of(*mine))
    )
    if faults := mismatches(found, wanted):
        raise CheckpointError(f"{what}: another semantic stream than model.text asks for: {faults[:600]}")
    return mesh.copy_to_all([text.filled(tree, arrays) for tree in mine], setup.mesh)


def _with_rows(state: TrainState, theirs: Classifier, learned: Learned, setup: Setup, catalog: Catalog) -> TrainState:
    """The state with the rows of the products that both have, and imprinted ones for those that are new."""
    mine, skus = state.classifier, list(catalog.classes.sku)
    shared = words_shared(setup.config, setup.shape)
    own = mine.kernel.shape[1] - shared
    place = {sku: row for row, sku in enumerate(learned.skus)}
    index = np.full(len(mine.bias), -1, np.int32)
    index[: len(skus)] = [place.get(sku, -1) for sku in skus]
    new = np.flatnonzero(index[: len(skus)] < 0)
    if len(new) or len(learned.skus) > len(skus):
        gone = len(learned.skus) - (len(skus) - len(new))
        hosts.say(
            f"{learned.what}: {len(skus) - len(new)} rows of products that both have, {counted(gone, 'row')} left behind"
        )
    known = mesh.class_vector(index, setup.mesh)
    kernel = _joined(mine.kernel, class_sharded.take_rows(theirs.kernel, known), known, own)
    bias = _joined(mine.bias[:, None], class_sharded.take_rows(theirs.bias[:, None], known), known, 1)[:, 0]
    state = dataclasses.replace(state, classifier=dataclasses.replace(mine, kernel=kernel, bias=bias))
    return imprinted(state, new, known, setup, catalog) if len(new) else state


def _joined(mine, theirs, known, own: int):
    """Rows [C, own + ...]: the first `own` numbers of `theirs` where a row is known (not -1), the rest of `mine`."""

    def join(mine, theirs, known):
        return jnp.concatenate([jnp.where(known[:, None] >= 0, theirs[:, :own], mine[:, :own]), mine[:, own:]], 1)

    return jax.jit(join)(mine, theirs, known)


def imprinted(state: TrainState, new: np.ndarray, known, setup: Setup, catalog: Catalog) -> TrainState:
    """Rows of `new` classes from their training photos. A class without a photo keeps its starting row.

    w = mean row of known classes + r * unit(mean of the class's unit embeddings - mean of all unit embeddings), r the mean
    distance of a known row from their mean row; the bias is their mean. Weight imprinting (Qi et al. 2018, arXiv:1712.07136)
    with both sides centred: embeddings are >= 0, so that the mean direction of any class is near that of all photos, and
    a row of it alone would win everywhere (docs/conversion.md).
    """
    classes, directions = _directions(state, new, setup, catalog)
    own = state.classifier.kernel.shape[1] - words_shared(setup.config, setup.shape)

    @jax.jit
    def usual(kernel, bias, known):
        weight = (known >= 0) / jnp.maximum(jnp.sum(known >= 0), 1)
        mean = jnp.sum(weight[:, None] * kernel[:, :own], 0)
        return mean, jnp.sum(jnp.linalg.norm(kernel[:, :own] - mean, axis=1) * weight), jnp.sum(bias * weight)

    mean, distance, bias = map(np.asarray, usual(state.classifier.kernel, state.classifier.bias, known))
    row_of = np.full(known.shape, -1, np.int32)
    row_of[classes] = np.arange(len(classes))
    rows = mesh.padded_rows((len(directions), own), mean + directions * distance, setup.mesh)
    made = mesh.class_vector(row_of, setup.mesh)
    kernel = _joined(state.classifier.kernel, class_sharded.take_rows(rows, made), made, own)
    changed = jax.jit(lambda mine, made: jnp.where(made >= 0, bias, mine))(state.classifier.bias, made)
    hosts.say(
        f"{counted(len(new), 'product')} new: rows of {len(classes)} from their photos"
        + (f", {len(new) - len(classes)} without one start anew" if len(classes) < len(new) else "")
    )
    return dataclasses.replace(state, classifier=dataclasses.replace(state.classifier, kernel=kernel, bias=changed))


def _photos_of(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Records of these classes, of each the first `PHOTOS_OF_A_NEW_CLASS`."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(order[(rank < PHOTOS_OF_A_NEW_CLASS) & np.isin(labels[order], classes)])


def _directions(state: TrainState, new: np.ndarray, setup: Setup, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Those of the classes that have a training photo, int [K], and for each the unit difference between the mean of its
    photos' unit embeddings and that of all photos (`PHOTOS_OF_ALL` of them), float32 [K, D].
    """
    config, width, split = setup.config, setup.mesh.size, catalog.splits["train"]
    own, some = _photos_of(new, split.labels), pipeline.evenly(len(split), PHOTOS_OF_ALL)
    if not len(own):
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    indices = np.union1d(own, some)
    embed = evaluate.make_embed(config.preprocessing, setup.visual_graphdef)
    visual = state.params["visual"], state.batch_stats["visual"]
    batch = -(-config.eval.batch_size // width) * width
    batches = pipeline.PhotoBatches(split, config.preprocessing, batch, indices)
    found = evaluate.over_photos(lambda image, _: {"embedding": embed(*visual, image)}, batches, config, setup.mesh)
    unit = _unit(found["embedding"])
    classes, place = np.unique(split.labels[own], return_inverse=True)
    total = np.zeros((len(classes), unit.shape[1]), np.float32)
    np.add.at(total, place, unit[np.searchsorted(indices, own)])
    counts = np.bincount(place)[:, None]
    return classes, _unit(total / counts - unit[np.searchsorted(indices, some)].mean(0))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
