"""Outputs of recognition engines."""

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.recognizer import DeviceEngine, EngineOutputs, onnx_engine
from sicot_jax.weights.bundle import MANIFEST_FILE, ONNX_FILE

onnx = pytest.importorskip("onnx", reason="ONNX needs the extra onnx")
pytest.importorskip("onnxruntime", reason="ONNX needs the extra onnx")

GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
made (uint8[B, 1, 4, 3] photos) => ({outputs}) {{
  numbers = Cast <to = 1> (photos)
  axes = Constant <value_ints = [1, 2]> ()
  embedding = ReduceMax <keepdims = 0> (numbers, axes)
  logits = ReduceMin <keepdims = 0> (numbers, axes)
  last = Constant <value_ints = [3]> ()
  sums = ReduceMean <keepdims = 0> (numbers, last)
  rows = Constant <value_ints = [1]> ()
  shares = Squeeze (sums, rows)
  side = Constant <value_float = 12.0> ()
  box = Div (shares, side)
}}
"""
PHOTOS = np.arange(24, dtype=np.uint8).reshape(2, 1, 4, 3)


def engine(folder, *outputs):
    text = GRAPH.format(outputs=", ".join(f"float[B, {width}] {name}" for name, width in outputs))
    onnx.save(onnx.parser.parse_model(text), folder / ONNX_FILE)
    return onnx_engine(folder)


def test_outputs_of_a_graph_are_read_by_name(tmp_path):
    """Whatever their order in the graph."""
    outputs = engine(tmp_path, ("box", 4), ("logits", 3), ("embedding", 3))(PHOTOS)
    assert outputs.embedding.tolist() == [[9, 10, 11], [21, 22, 23]]
    assert outputs.logits.tolist() == [
        [0, 1, 2],
        [12, 13, 14],
    ]
    np.testing.assert_allclose(outputs.box, np.array([[1, 4, 7, 10], [13, 16, 19, 22]]) / 12)


def test_a_graph_without_boxes(tmp_path):
    assert engine(tmp_path, ("embedding", 3), ("logits", 3))(PHOTOS).box is None


def test_outputs_per_photo():
    outputs = EngineOutputs(np.zeros((2, 5)), np.ones((2, 3)), np.arange(8).reshape(2, 4))
    first, second = outputs.per_photo()
    assert first.embedding.shape == (5,)
    assert first.logits.shape == (3,)
    assert second.box.tolist() == [4, 5, 6, 7]
    assert [one.box for one in outputs._replace(box=None).per_photo()] == [None, None]
    with pytest.raises(ValueError, match="zip"):
        list(outputs._replace(logits=np.ones((1, 3))).per_photo())


def test_the_provider_in_use_is_named_and_a_fall_back_from_a_gpu_is_said(tmp_path, monkeypatch):
    import onnxruntime

    made = engine(tmp_path, ("embedding", 3), ("logits", 3))
    assert (made.provider, made.fallback, made.on_cpu) == ("CPUExecutionProvider", "", True)
    # A build for CUDA where CUDA cannot be started: sessions have the CPU's provider alone.
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, providers=providers[1:]),
    )
    made = onnx_engine(tmp_path)
    assert made.provider == "CPUExecutionProvider"
    assert "could not start CUDAExecutionProvider and runs on the CPU" in made.fallback
    assert not DeviceEngine(made.run, "CUDAExecutionProvider").on_cpu


def test_a_graph_that_this_onnx_runtime_cannot_read_names_the_version_that_wrote_it(tmp_path):
    engine(tmp_path, ("embedding", 3), ("logits", 3))
    graph = onnx.load(tmp_path / ONNX_FILE)
    graph.ir_version = 99
    (tmp_path / ONNX_FILE).write_bytes(graph.SerializeToString())
    (tmp_path / MANIFEST_FILE).write_text('{"versions": {"onnxruntime": "9.9"}}')
    with pytest.raises(InputError, match=r"cannot load the graph .*, written with 9\.9; install"):
        onnx_engine(tmp_path)
