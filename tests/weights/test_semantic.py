"""The semantic stream in PyTorch: every encoder, and the round trip of a run."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from sicot_jax import config as config_lib
from sicot_jax.catalog.tokenizer import build_tokenizer, load_tokenizer
from sicot_jax.cli import main as cli
from sicot_jax.config import TEXT_ENCODERS
from sicot_jax.training.loop import train
from sicot_jax.weights.bundle import TextEncoderSpec, read_bundle
from sicot_jax.weights.safetensors_io import read_weights
from sicot_jax.weights.semantic import (
    NUM_TITLES,
    init_semantic_stream,
    semantic_from_torch,
    semantic_outputs_jax,
    semantic_outputs_torch,
    semantic_to_torch,
    write_text_encoder,
)

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")
TITLES = [
    "red cotton shirt",
    "",
    "shirt",
    "blue cotton shirt with many many words blue red",
    "unheard of",
]


def spec_of(encoder, weighting="softmax"):
    return TextEncoderSpec(
        encoder, 4, 6, weighting, word_width=8, embedding_width=10, max_tokens=6, vocabulary=""
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TITLES[:4], min_count=1, drop_top_share=0)


@pytest.mark.parametrize(
    ("encoder", "weighting"),
    [*((name, "softmax") for name in TEXT_ENCODERS), ("bilinear", "sigmoid")],
)
def test_every_encoder_gives_the_same_embeddings_in_pytorch(
    tmp_path, tokenizer, encoder, weighting
):
    """With random weights, on empty titles, unknown words and titles beyond max_tokens. Converted
    back, the weights are equal.
    """
    spec = spec_of(encoder, weighting)
    _, *trees = nnx.split(
        init_semantic_stream(spec, len(tokenizer.vocabulary)), nnx.Param, nnx.BatchStat
    )
    rng = np.random.default_rng(0)
    random = [
        jax.tree.map(
            lambda x, low=low: rng.uniform(low, 1.5, x.shape).astype(np.float32),
            nnx.to_pure_dict(tree),
        )
        for tree, low in zip(
            trees, (-1.5, 0.5), strict=True
        )  # parameters of both signs, variances of one
    ]
    arrays = semantic_to_torch(*random)
    for tree in random:
        jax.tree.map(np.testing.assert_array_equal, semantic_from_torch(tree, arrays), tree)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text": dataclasses.asdict(spec)}))
    report = write_text_encoder(tmp_path, spec, arrays)
    assert report.inputs == "titles"
    assert report.count == NUM_TITLES
    assert report.differences["embedding"].max_relative < 1e-5
    expected = semantic_outputs_jax(spec, arrays, tokenizer, TITLES).embedding
    actual = semantic_outputs_torch(tmp_path, TITLES).embedding
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert not expected[1].any()
    assert not expected[4].any()
    assert expected[0].any()


@pytest.fixture(scope="module")
def run(make_once):
    config = config_lib.load_config(
        "tiny", ["--config.train.steps=3", "--config.model.text.encoder=lstm_attention"]
    )
    return make_once("text", lambda folder: train(config, folder / "run")) / "run"


@pytest.mark.slow
def test_a_run_s_text_encoder_in_plain_pytorch_and_back(run, tmp_path, capsys):
    """PyTorch computes logits of the mixed stream without jax and sicot_jax. Changed weights are
    imported, and training starts from them.
    """
    out = tmp_path / "out"
    assert cli.main(["convert", "to-torch", f"--workdir={run}", f"--out={out}", "--with-text"]) == 0
    assert "titles, JAX against PyTorch: embedding differs by" in capsys.readouterr().out
    stored = read_bundle(out)
    assert stored.text.encoder == "lstm_attention"
    assert stored.text.max_tokens == 8
    title = " ".join(load_tokenizer(out).vocabulary[1:4])
    program = (
        "import sys, numpy, torch\n"
        "sys.modules['jax'] = sys.modules['sicot_jax'] = None\n"
        "from model import SicotRecognizer\n"
        "from text import SicotTextEncoder\n"
        "recognizer = SicotRecognizer.from_pretrained('.')\n"
        "encoder = SicotTextEncoder.from_pretrained('.')\n"
        "photo = recognizer.preprocess(numpy.zeros((30, 30, 3), numpy.uint8))[None]\n"
        "with torch.inference_mode():\n"
        f"    embedding, weights = encoder(encoder.token_ids([{title!r}]))\n"
        "    logits = recognizer.fc(torch.maximum(recognizer.embed(photo), embedding))\n"
        "print(tuple(logits.shape), int((weights > 0).sum()), round(float(weights.sum()), 4))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=out, check=True, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[0] == "(1, 11) 3 1.0"

    import safetensors.torch

    arrays = safetensors.torch.load_file(out / "text.safetensors")
    arrays["projection.weight"] += 0.25
    safetensors.torch.save_file(arrays, out / "text.safetensors")
    back = tmp_path / "back"
    assert cli.main(["convert", "from-torch", str(out), f"--out={back}"]) == 0
    assert read_weights(back / "text.safetensors").keys() == arrays.keys()
    assert read_bundle(back).text == stored.text
    words_file = out / "words.txt"  # edited words are another vocabulary
    words_file.write_text(words_file.read_text().replace("\n", "x\n").removeprefix("x"))
    other = tmp_path / "other"
    assert cli.main(["convert", "from-torch", str(out), f"--out={other}"]) == 0
    assert read_bundle(other).text.vocabulary != stored.text.vocabulary
    frozen = ["optim.trainable=classifier/bias", "optim.learning_rate=1e-9", "train.steps=1"]
    flags = [
        f"--config.{flag}"
        for flag in (*frozen, f"model.init_from={back}", "model.text.encoder=lstm_attention")
    ]
    train(config_lib.load_config("tiny", flags), tmp_path / "run")
    assert (
        cli.main(
            [
                "convert",
                "to-torch",
                f"--workdir={tmp_path / 'run'}",
                f"--out={tmp_path / 'on'}",
                "--with-text",
            ]
        )
        == 0
    )
    exported = read_weights(tmp_path / "on" / "text.safetensors")
    np.testing.assert_allclose(
        exported["projection.weight"], arrays["projection.weight"], rtol=1e-6
    )


def test_a_run_without_a_semantic_stream_has_no_text_encoder(run, tmp_path, capsys):
    stored, out = json.loads((run / "config.json").read_text()), tmp_path / "out"
    stored["config"]["loss"]["mixed"] = 0.0
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert (
        cli.main(["convert", "to-torch", f"--workdir={tmp_path}", f"--out={out}", "--with-text"])
        == 2
    )
    assert "trained without a semantic stream (loss.mixed=0)" in capsys.readouterr().err
    assert not out.exists()


def test_another_encoder_than_that_of_the_config_is_refused(run, tmp_path):
    from sicot_jax.training.checkpoint import CheckpointError

    assert (
        cli.main(
            ["convert", "to-torch", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--with-text"]
        )
        == 0
    )
    with pytest.raises(
        CheckpointError, match=r"another semantic stream than model.text asks for: .*lstm"
    ):
        train(
            config_lib.load_config("tiny", [f"--config.model.init_from={tmp_path / 'out'}"]),
            tmp_path / "other",
        )
