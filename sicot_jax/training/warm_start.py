"""Training that starts from what was learned before (`model.init_from`): a run, or converted
weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.batches import PhotoBatchLoader, evenly_spaced
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.common.text import pluralize
from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.classifier import imprint
from sicot_jax.classifier import sharded as class_sharded
from sicot_jax.classifier.heads import Classifier
from sicot_jax.config import Config, ConfigError
from sicot_jax.parallel import distributed
from sicot_jax.parallel import mesh
from sicot_jax.training import evaluate
from sicot_jax.training import run as runs
from sicot_jax.training.checkpoint import CheckpointError, differences, shapes
from sicot_jax.training.state import TrainState
from sicot_jax.training.setup import Setup
from sicot_jax.training.model import num_word_columns
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import semantic as text
from sicot_jax.weights import visual as network
from sicot_jax.weights.torch_names import mismatches


@dataclasses.dataclass(frozen=True)
class Learned:
    """What is there to start from. `skus` of the rows of the classifier, which is None where there
    is none.
    """

    what: str
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    classifier: Classifier | None
    skus: Sequence[str]
    vocabulary: str
    word_rows: bool  # whether the classifier's rows end in shares of words


def warm_start(state: TrainState, setup: Setup, catalog: Catalog) -> TrainState:
    """`state` with the streams of `model.init_from`, and the classifier's rows of the products that
    both have.

    What belongs to words is taken only where the vocabulary is the same: ids of another one mean
      other words. What rows share through titles stays the catalogue's (`word_rows`); where the
      scores are not taken, rows come with what they shared. Codes are taken where they have as many
      bits, a box branch where both have one. A product that is new gets a row from its photos
      (`imprinted`); one that is gone leaves none. Raises CheckpointError naming parameters of
      another shape.
    """
    config = setup.config
    learned = _learned(Path(config.model.init_from), state, setup, catalog)
    same_words = learned.vocabulary == runs.vocabulary_hash(catalog.tokenizer)
    params, batch_stats = ({**mine} for mine in (state.params, state.batch_stats))
    for stream in state.params.keys() & learned.params.keys():
        params[stream], batch_stats[stream] = learned.params[stream], learned.batch_stats[stream]
    if "semantic" in state.params and "semantic" in learned.params and not same_words:
        distributed.print_primary(f"{learned.what}: another vocabulary; word vectors are the catalogue's own")
        params["semantic"] = {
            **params["semantic"],
            "word_vectors": state.params["semantic"]["word_vectors"],
        }
    with_scores = same_words and all("tag_head" in s.params["visual"] for s in (state, learned))
    own = set() if with_scores else {"tag_head"}
    own |= set() if _same_bits(state.params["visual"], learned.params["visual"]) else {"code_head"}
    own |= (
        set()
        if all("localization" in s.params["visual"] for s in (state, learned))
        else {"localization"}
    )
    for mine, all_of in ((state.params, params), (state.batch_stats, batch_stats)):
        theirs = {name: x for name, x in all_of["visual"].items() if name not in own}
        all_of["visual"] = theirs | {name: x for name, x in mine["visual"].items() if name in own}
    if faults := differences(shapes(params), shapes(state.params)):
        raise CheckpointError(f"{learned.what}: another model: {faults}")
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats)
    if learned.classifier is None:
        return state
    both = config.model.shared_word_weights and learned.word_rows and with_scores
    classifier = learned.classifier if both else evaluate.plain_classifier(learned)
    return _with_rows(state, classifier, learned, setup, catalog)


def _same_bits(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both visual streams have codes, of as many bits."""
    return (
        "code_head" in mine
        and "code_head" in theirs
        and mine["code_head"]["bias"].shape == theirs["code_head"]["bias"].shape
    )


def check_source(config: Config) -> None:
    """InputError where `model.init_from` is nothing to start from, or saw its photos otherwise;
    before anything is compiled.

    Strides may differ (a last stride of 1 is often put on weights of 2); that is said.
    """
    path = Path(config.model.init_from)
    what = f"model.init_from={path}"
    if folders.is_converted(path):
        folders.check_trainable(path)
        theirs: Any = folders.read_config(path)
        model = theirs.model
    else:
        theirs = runs.read_run(path).config
        model = theirs.model
    for name in ("mean", "std"):
        before, now = getattr(theirs.preprocessing, name), getattr(config.preprocessing, name)
        if not np.allclose(before, now, atol=1e-6):
            raise ConfigError(
                f"{what}: its photos had preprocessing.{name}={before}, the config has {now}; set "
                f"--config.preprocessing.{name}={','.join(map(str, before))}"
            )
    for name in ("stem", "last_stride"):
        before, now = getattr(model, name), getattr(config.model, name)
        if before != now:
            distributed.print_primary(f"{what}: trained with model.{name}={before}, goes on with {now}")


def _learned(path: Path, state: TrainState, setup: Setup, catalog: Catalog) -> Learned:
    what = f"model.init_from={path}"
    if folders.is_converted(path):
        return _from_converted(path, what, state, setup)
    run = runs.read_run(path)
    source_setup, source, trained = runs.restore_best(run, setup.mesh)
    if trained < source_setup.steps:
        distributed.print_primary(f"{what}: a run trained for {trained} of {source_setup.steps} steps")
    same = run.class_table == evaluate.class_table_hash(catalog)
    skus = catalog.classes.sku if same else read_class_table(runs.class_table_file(run)).sku
    rows_share_words = run.config.model.shared_word_weights
    return Learned(
        what,
        source.params,
        source.batch_stats,
        source.classifier,
        skus,
        run.vocabulary,
        rows_share_words,
    )


def _from_converted(path: Path, what: str, state: TrainState, setup: Setup) -> Learned:
    """The streams and, where there is one, the classifier of a folder of `sicot convert`.

    A projection or a box branch that the weights do not have stays as it is; a box branch that the
    model does not have is left.
    """
    import safetensors

    converted, config = folders.read_converted(path), setup.config
    params, stats = state.params["visual"], state.batch_stats["visual"]
    with safetensors.safe_open(path / folders.WEIGHTS, framework="numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        rows = {name: found.pop(name) for name in ("fc.weight", "fc.bias") if name in found}
        wanted = network.shapes_of(params, stats)
        if not converted.model.embedding_width:
            wanted = {
                name: shape for name, shape in wanted.items() if not name.startswith("projection")
            }
        if "none" in (converted.model.box, config.model.localization):
            found, wanted = (
                {name: shape for name, shape in shapes.items() if not name.startswith("box.")}
                for shapes in (found, wanted)
            )
        if faults := mismatches(found, wanted):
            raise CheckpointError(
                f"{what}: a ResNet-{converted.model.depth} of width {converted.model.width}, and model.depth="
                f"{config.model.depth}, model.width={config.model.width} want other arrays: {faults[:600]}"
            )
        arrays = {name: file.get_tensor(name) for name in found}
        params, stats = mesh.replicate_tree(
            [network.filled(tree, arrays) for tree in (params, stats)], setup.mesh
        )
        classifier = None
        if rows:
            bias = mesh.shard_rows(rows["fc.bias"], file.get_slice("fc.bias"), setup.mesh)
            kernel = mesh.shard_rows(rows["fc.weight"], file.get_slice("fc.weight"), setup.mesh)
            classifier = Classifier(kernel, bias, jnp.zeros_like(bias), (), {})
    skus = folders.read_classes(path, converted.model).sku if rows else []
    streams, vocabulary = {"visual": (params, stats)}, ""
    if converted.text is not None and "semantic" in state.params:
        streams["semantic"], vocabulary = (
            _semantic(path, what, state, setup),
            converted.text.vocabulary,
        )
    all_params, all_stats = (
        {name: stream[i] for name, stream in streams.items()} for i in range(2)
    )
    return Learned(what, all_params, all_stats, classifier, skus, vocabulary, word_rows=False)


def _semantic(path: Path, what: str, state: TrainState, setup: Setup) -> Any:
    """Params and batch statistics of the folder's semantic stream; its word table may be of another
    vocabulary.
    """
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(path / folders.TEXT)
    mine = state.params["semantic"], state.batch_stats["semantic"]
    found, wanted = (
        {n: a.shape for n, a in some.items() if n != "words.weight"}
        for some in (arrays, text.arrays_of(*mine))
    )
    if faults := mismatches(found, wanted):
        raise CheckpointError(
            f"{what}: another semantic stream than model.text asks for: {faults[:600]}"
        )
    return mesh.replicate_tree([text.filled(tree, arrays) for tree in mine], setup.mesh)


def _with_rows(
    state: TrainState, theirs: Classifier, learned: Learned, setup: Setup, catalog: Catalog
) -> TrainState:
    """The state with the rows of the products that both have, and imprinted ones for those that are
    new.
    """
    mine, skus = state.classifier, list(catalog.classes.sku)
    shared = num_word_columns(setup.config, setup.shape)
    own = mine.kernel.shape[1] - shared
    place = {sku: row for row, sku in enumerate(learned.skus)}
    discontinued = np.asarray(
        catalog.classes.discontinued, bool
    )  # they keep their class ids, and nothing else
    index = np.full(len(mine.bias), -1, np.int32)
    index[: len(skus)] = [
        -1 if gone else place.get(sku, -1) for sku, gone in zip(skus, discontinued, strict=True)
    ]
    new = np.flatnonzero((index[: len(skus)] < 0) & ~discontinued)
    both = int((index >= 0).sum())
    distributed.print_primary(
        f"{learned.what}: {pluralize(both, 'row')} of products that both have, "
        f"{pluralize(len(learned.skus) - both, 'row')} left behind"
    )
    known = mesh.shard_class_vector(index, setup.mesh)
    kernel = _joined(mine.kernel, class_sharded.take_rows(theirs.kernel, known), known, own)
    bias = _joined(
        mine.bias[:, None], class_sharded.take_rows(theirs.bias[:, None], known), known, 1
    )[:, 0]
    state = dataclasses.replace(
        state, classifier=dataclasses.replace(mine, kernel=kernel, bias=bias)
    )
    return imprinted(state, new, index, setup, catalog) if len(new) else state


def _joined(mine, theirs, known, own: int):
    """Rows [C, own + ...]: the first `own` numbers of `theirs` where a row is known (not -1), the
    rest of `mine`.
    """

    def join(mine, theirs, known):
        return jnp.concatenate(
            [jnp.where(known[:, None] >= 0, theirs[:, :own], mine[:, :own]), mine[:, own:]], 1
        )

    return jax.jit(join)(mine, theirs, known)


def imprinted(
    state: TrainState, new: np.ndarray, index: np.ndarray, setup: Setup, catalog: Catalog
) -> TrainState:
    """Rows of `new` classes from their training photos; a class without a photo keeps its starting
    row. `index` [C padded] is
    -1 for every class that is not known.

    As `imprint` makes them, from `imprint.PHOTOS` photos each, set against `imprint.KNOWN` known
    classes.
    """
    present = np.flatnonzero(index >= 0)
    some = present[evenly_spaced(len(present), imprint.KNOWN)]
    if not len(present):
        distributed.print_primary("no product in common: all rows start anew")
        return state
    classes, means = _means(state, np.concatenate([new, some]), setup, catalog)
    own = state.classifier.kernel.shape[1] - num_word_columns(setup.config, setup.shape)
    is_new = np.isin(classes, new)
    mean, bias, rows = _known_rows(state.classifier, index, classes[~is_new], own, setup)
    made_with = imprint.fit(means[~is_new], rows, mean, float(bias))
    row_of = np.full(index.shape, -1, np.int32)
    row_of[classes[is_new]] = np.arange(is_new.sum())
    shape = (int(is_new.sum()), own)
    made = mesh.shard_class_vector(row_of, setup.mesh)
    new_rows = mesh.shard_rows(shape, made_with.rows(means[is_new]), setup.mesh)
    kernel = _joined(state.classifier.kernel, class_sharded.take_rows(new_rows, made), made, own)
    changed = jax.jit(lambda mine, made: jnp.where(made >= 0, bias, mine))(
        state.classifier.bias, made
    )
    distributed.print_primary(
        f"{pluralize(len(new), 'product')} new: rows of {shape[0]} from their photos"
        + (f", {len(new) - shape[0]} without one start anew" if shape[0] < len(new) else "")
    )
    return dataclasses.replace(
        state, classifier=dataclasses.replace(state.classifier, kernel=kernel, bias=changed)
    )


def _known_rows(
    classifier: Classifier, index: np.ndarray, some: np.ndarray, own: int, setup: Setup
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean row [D] and mean bias [] over all known classes (index not -1), and the rows of `some`
    of them, float32 [K, D].
    """

    @jax.jit
    def means(kernel, bias, known):
        weight = (known >= 0) / jnp.maximum(jnp.sum(known >= 0), 1)
        return jnp.sum(weight[:, None] * kernel[:, :own], 0), jnp.sum(bias * weight)

    known = mesh.shard_class_vector(index, setup.mesh)
    padded = np.full(mesh.pad_classes(len(some), setup.mesh), -1, np.int32)
    padded[: len(some)] = some
    rows = class_sharded.take_rows(classifier.kernel, mesh.shard_class_vector(padded, setup.mesh))
    mean, bias = means(classifier.kernel, classifier.bias, known)
    return np.asarray(mean), np.asarray(bias), np.asarray(mesh.replicate(rows))[: len(some), :own]


def _means(
    state: TrainState, chosen: np.ndarray, setup: Setup, catalog: Catalog
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the chosen classes that have a training photo, int [K], and the mean of their unit
    v, float32 [K, D].
    """
    labels = catalog.splits["train"].labels
    indices = imprint.first_photos(labels, chosen)
    if not len(indices):
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    return imprint.mean_directions(_embedded(state, indices, setup, catalog), labels[indices])


def _embedded(state: TrainState, indices: np.ndarray, setup: Setup, catalog: Catalog) -> np.ndarray:
    """v of these records' photos, float32 [N, D]."""
    config, width = setup.config, setup.mesh.size
    embed = evaluate.make_embed(config.preprocessing, setup.visual_graphdef)
    visual = state.params["visual"], state.batch_stats["visual"]
    batch = -(-config.eval.batch_size // width) * width
    batches = PhotoBatchLoader(catalog.splits["train"], config.preprocessing, batch, indices)
    compute = lambda image, _: {"embedding": embed(*visual, image)}  # noqa: E731
    return evaluate.over_photos(compute, batches, config, setup.mesh)["embedding"]
