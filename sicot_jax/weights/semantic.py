"""The semantic stream of a converted folder: its arrays by torch's names, its vocabulary, and both
sides on the same titles.

text.safetensors   arrays, float32
text.py            plain PyTorch (`torch_text.py`)
words.txt          the vocabulary; of pieces sentencepiece.model and pieces.txt
config.json        "text": see `folder.Text`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.catalog import tokenizer as words
from sicot_jax.catalog.catalog import Tokenizer
from sicot_jax.common.trees import path_name
from sicot_jax.models.semantic_stream import SemanticStream
from sicot_jax.parallel import mesh
from sicot_jax.weights import bundle as folders
from sicot_jax.weights import parity as proof
from sicot_jax.weights import safetensors_io as weights
from sicot_jax.weights import torch_names as names
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Text
from sicot_jax.weights.parity import Outputs

TITLES = 8
WHAT = "titles, JAX against PyTorch"
_SIDES = ("", "_reverse")  # of a bi-LSTM
_LSTM = {"kernel": "weight_ih", "recurrent": "weight_hh", "bias": "bias_ih"}
_LINEAR = {"kernel": "weight", "bias": "bias"}
TOKENIZER_FILES = (words.WORDS_FILE, words.SENTENCEPIECE_FILE, words.PIECES_FILE)


def torch_names(path: str) -> tuple[str, ...]:
    """Path below "semantic" -> torch's name; two for an array that holds both directions of a
    bi-LSTM.
    """
    match path.split("/"):
        case ["word_vectors"]:
            return ("words.weight",)
        case ["projection", part]:
            return (f"projection.{_LINEAR[part]}",)
        case ["projection_norm", part]:
            return (f"projection_norm.{names.PARTS[part]}",)
        case ["encoder", "lstm", part]:
            return tuple(f"lstm.{_LSTM[part]}_l0{side}" for side in _SIDES)
        case [*_, module, part]:
            return (f"{module}.{_LINEAR[part]}",)
    raise AssertionError(path)


def arrays_of(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """The stream's arrays in torch's names and layout, on the host."""
    arrays = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            named = torch_names(path_name(path))
            for name, array in zip(
                named, np.asarray(leaf) if len(named) > 1 else [np.asarray(leaf)], strict=True
            ):
                arrays[name] = array if name == "words.weight" else names.to_torch_layout(array)
    for name in [name for name in arrays if name.startswith("lstm.bias_ih")]:
        arrays[name.replace("bias_ih", "bias_hh")] = np.zeros_like(
            arrays[name]
        )  # torch has two biases, which it adds
    return arrays


def filled(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree of the stream's params or batch statistics with the values of `arrays`; shapes are not
    checked.
    """

    def one(name: str) -> np.ndarray:
        array = arrays[name]
        if name.startswith("lstm.bias_ih"):
            array = array + arrays[name.replace("bias_ih", "bias_hh")]
        return array if name == "words.weight" else names.from_torch_layout(array)

    def fill(path, _):
        found = [one(name) for name in torch_names(path_name(path))]
        return jnp.asarray(np.stack(found) if len(found) > 1 else found[0])

    return jax.tree_util.tree_map_with_path(fill, tree)


def fresh_stream(text: Text, words: int) -> SemanticStream:
    """A semantic stream of that kind with starting values."""
    shape, rng = (words, text.word_width), np.random.default_rng(0)
    return SemanticStream(text.config, shape, text.embedding_width, dtype=jnp.float32, rng=rng)


def shapes_of(text: Text, vocabulary: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Torch's name -> shape of every array that such a stream has."""
    _, *trees = nnx.split(
        nnx.eval_shape(lambda: fresh_stream(text, len(vocabulary))), nnx.Param, nnx.BatchStat
    )
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
        [nnx.to_pure_dict(t) for t in trees],
    )
    return {name: array.shape for name, array in arrays_of(*empty).items()}


def fixed_titles(vocabulary: Sequence[str]) -> list[str]:
    """The same everywhere: no word, then more and more words of the vocabulary."""
    rng = np.random.Generator(np.random.Philox(0))
    drawn = [rng.integers(1, max(2, len(vocabulary)), count) for count in range(TITLES)]
    pieces = any(word.startswith(words.WORD_START) for word in vocabulary)
    titles = [
        ("" if pieces else " ").join(vocabulary[i] for i in row if i < len(vocabulary))
        for row in drawn
    ]
    return [title.replace(words.WORD_START, " ") for title in titles]


def outputs_here(
    text: Text, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer, titles: Sequence[str]
) -> Outputs:
    """Embeddings of titles by our own code, in float32."""
    ids = np.zeros((len(titles), text.max_tokens), np.int32)
    for row, title in zip(ids, titles, strict=True):
        known = tokenizer.encode(title)[: text.max_tokens]
        row[: len(known)] = known
    stream = nnx.eval_shape(lambda: fresh_stream(text, len(tokenizer.vocabulary)))
    graphdef, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)

    @jax.jit
    def read(trees, ids):
        return nnx.merge(graphdef, *trees, copy=True)(ids, train=False)[0]

    alone = mesh.make_mesh(devices=jax.local_devices()[:1])
    with jax.default_matmul_precision("highest"), jax.set_mesh(alone):
        return Outputs(
            np.asarray(read([filled(nnx.to_pure_dict(tree), arrays) for tree in trees], ids)), None
        )


def outputs_in_torch(folder: Path, titles: Sequence[str]) -> Outputs:
    """The same by the folder's own `text.py`."""
    import torch

    stream = network.load_module(folder / "text.py").SemanticStream.from_pretrained(folder)
    with torch.inference_mode():
        return Outputs(stream(stream.ids(list(titles)))[0].numpy(), None)


def write_text(new: Path, text: Text, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Add the stream to a folder that has its vocabulary and `config.json` already; returns what
    was compared.
    """
    weights.write_weights(new / folders.TEXT, arrays)
    shutil.copy(Path(__file__).with_name("torch_text.py"), new / "text.py")
    tokenizer = words.load_tokenizer(new)
    titles = fixed_titles(tokenizer.vocabulary)
    here, there = outputs_here(text, arrays, tokenizer, titles), outputs_in_torch(new, titles)
    return proof.prove(here, there, what=WHAT, items="titles")
