"""Converts the semantic stream to torch arrays and back, and runs it in JAX and in PyTorch.

Its files in a weights bundle:

| file                                       | content                                    |
|--------------------------------------------|--------------------------------------------|
| text.safetensors                           | arrays, float32                            |
| text.py                                    | plain PyTorch (`templates.torch_text`)     |
| words.txt                                  | the vocabulary, of words                   |
| sentencepiece.model, pieces.txt            | the vocabulary, of SentencePiece pieces    |
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

from sicot_jax.catalog import tokenizer as tokenizers
from sicot_jax.catalog.catalog import Tokenizer
from sicot_jax.common.trees import path_name
from sicot_jax.models.semantic_stream import SemanticStream
from sicot_jax.parallel import mesh
from sicot_jax.weights.bundle import TEXT_WEIGHTS_FILE, TextEncoderSpec
from sicot_jax.weights.parity import ModelOutputs, ParityReport, check_parity
from sicot_jax.weights.safetensors_io import write_weights
from sicot_jax.weights.torch_names import BATCH_NORM_PARTS, from_torch_layout, to_torch_layout
from sicot_jax.weights.visual import load_module

NUM_TITLES = 8
PARITY_LABEL = "titles, JAX against PyTorch"
TOKENIZER_FILES = (tokenizers.WORDS_FILE, tokenizers.SENTENCEPIECE_FILE, tokenizers.PIECES_FILE)
_TEMPLATE = Path(__file__).parent / "templates" / "torch_text.py"
_DIRECTIONS = {"forward": "", "backward": "_reverse"}  # of a bidirectional LSTM
_LSTM_PARTS = {
    ("dense_i", "kernel"): "weight_ih",
    ("dense_h", "kernel"): "weight_hh",
    ("dense_h", "bias"): "bias_ih",
}
_LINEAR_PARTS = {"kernel": "weight", "bias": "bias"}
_WORDS = "words.weight"  # the word vectors, which are not transposed


def semantic_array_name(path: str) -> str:
    """Returns the torch name of an array of the semantic stream.

    Args:
      path: Path below "semantic", such as "projection/kernel".

    Returns:
      The name, such as "projection.weight".
    """
    match path.split("/"):
        case ["word_vectors"]:
            return _WORDS
        case ["projection", part]:
            return f"projection.{_LINEAR_PARTS[part]}"
        case ["projection_norm", part]:
            return f"projection_norm.{BATCH_NORM_PARTS[part]}"
        case ["encoder", "lstm", direction, "cell", layer, part]:
            return f"lstm.{_LSTM_PARTS[layer, part]}_l0{_DIRECTIONS[direction]}"
        case [*_, module, part]:
            return f"{module}.{_LINEAR_PARTS[part]}"
    raise AssertionError(path)


def semantic_to_torch(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """Returns the semantic stream's arrays by torch's names and in torch's layout.

    Args:
      params: Tree of its parameters.
      batch_stats: Tree of its batch norm statistics.

    Returns:
      Name -> array on the host, float32.
    """
    arrays = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, array = semantic_array_name(path_name(path)), np.asarray(leaf)
            arrays[name] = array if name == _WORDS else to_torch_layout(array)
    for name in [name for name in arrays if name.startswith("lstm.bias_ih")]:
        # Torch has two biases, which it adds.
        arrays[name.replace("bias_ih", "bias_hh")] = np.zeros_like(arrays[name])
    return arrays


def semantic_from_torch(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns `tree` with each array replaced by the PyTorch array of that name, in flax layout.

    Shapes are not checked.

    Args:
      tree: Parameters or batch norm statistics of a semantic stream.
      arrays: All its arrays by torch's names.

    Returns:
      A tree of the structure of `tree`.
    """

    def replace(path: Any, _: Any) -> jax.Array:
        name = semantic_array_name(path_name(path))
        array = arrays[name]
        if name.startswith("lstm.bias_ih"):
            array = array + arrays[name.replace("bias_ih", "bias_hh")]
        return jnp.asarray(array if name == _WORDS else from_torch_layout(array))

    return jax.tree_util.tree_map_with_path(replace, tree)


def init_semantic_stream(spec: TextEncoderSpec, num_words: int) -> SemanticStream:
    """Builds a semantic stream with initial values.

    Args:
      spec: Its architecture.
      num_words: V, size of the vocabulary with the padding word.

    Returns:
      The stream, float32.
    """
    shape, rng = (num_words, spec.word_width), np.random.default_rng(0)
    return SemanticStream(spec.config, shape, spec.embedding_width, dtype=jnp.float32, rng=rng)


def semantic_shapes(spec: TextEncoderSpec, vocabulary: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the semantic stream's arrays in torch's layout.

    Args:
      spec: Its architecture.
      vocabulary: Its words.

    Returns:
      Torch's name -> shape.
    """
    _, *trees = nnx.split(
        nnx.eval_shape(lambda: init_semantic_stream(spec, len(vocabulary))),
        nnx.Param,
        nnx.BatchStat,
    )
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
        [nnx.to_pure_dict(tree) for tree in trees],
    )
    return {name: array.shape for name, array in semantic_to_torch(*empty).items()}


def parity_titles(vocabulary: Sequence[str]) -> list[str]:
    """Returns the titles of every parity check: none, then more and more words of a vocabulary.

    Args:
      vocabulary: The vocabulary.

    Returns:
      `NUM_TITLES` titles, the same on every machine.
    """
    rng = np.random.Generator(np.random.Philox(0))
    drawn = [rng.integers(1, max(2, len(vocabulary)), count) for count in range(NUM_TITLES)]
    is_pieces = any(word.startswith(tokenizers.WORD_START) for word in vocabulary)
    titles = [
        ("" if is_pieces else " ").join(vocabulary[i] for i in row if i < len(vocabulary))
        for row in drawn
    ]
    return [title.replace(tokenizers.WORD_START, " ") for title in titles]


def semantic_outputs_jax(
    spec: TextEncoderSpec,
    arrays: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    titles: Sequence[str],
) -> ModelOutputs:
    """Runs the semantic stream in JAX with float32 matrix products.

    Args:
      spec: Architecture.
      arrays: Weights by torch's names.
      tokenizer: The vocabulary.
      titles: Titles to embed.

    Returns:
      Embeddings alone.
    """
    ids = np.zeros((len(titles), spec.max_tokens), np.int32)
    for row, title in zip(ids, titles, strict=True):
        known = tokenizer.encode(title)[: spec.max_tokens]
        row[: len(known)] = known
    stream = nnx.eval_shape(lambda: init_semantic_stream(spec, len(tokenizer.vocabulary)))
    graphdef, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)

    @jax.jit
    def forward(trees: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, *trees, copy=True)(ids, train=False)[0]

    single_device = mesh.make_mesh(devices=jax.local_devices()[:1])
    with jax.default_matmul_precision("highest"), jax.set_mesh(single_device):
        filled = [semantic_from_torch(nnx.to_pure_dict(tree), arrays) for tree in trees]
        return ModelOutputs(np.asarray(forward(filled, ids)), None)


def semantic_outputs_torch(folder: Path, titles: Sequence[str]) -> ModelOutputs:
    """Runs the `text.py` of a bundle.

    Args:
      folder: Bundle with a semantic stream.
      titles: Titles to embed.

    Returns:
      Embeddings alone.
    """
    import torch

    encoder = load_module(folder / "text.py").SicotTextEncoder.from_pretrained(folder)
    with torch.inference_mode():
        return ModelOutputs(encoder(encoder.token_ids(list(titles)))[0].numpy(), None)


def write_text_encoder(
    folder: Path, spec: TextEncoderSpec, arrays: Mapping[str, np.ndarray]
) -> ParityReport:
    """Adds a semantic stream to a bundle that has its vocabulary and `config.json` already.

    Args:
      folder: The bundle.
      spec: Architecture of the stream.
      arrays: Weights by torch's names.

    Returns:
      Comparison of JAX with the written `text.py`.

    Raises:
      InputError: The two do not agree.
    """
    write_weights(folder / TEXT_WEIGHTS_FILE, arrays)
    shutil.copy(_TEMPLATE, folder / "text.py")
    tokenizer = tokenizers.load_tokenizer(folder)
    titles = parity_titles(tokenizer.vocabulary)
    expected = semantic_outputs_jax(spec, arrays, tokenizer, titles)
    actual = semantic_outputs_torch(folder, titles)
    return check_parity(expected, actual, label=PARITY_LABEL, inputs="titles")
