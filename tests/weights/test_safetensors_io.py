"""Reading and writing of weight files; bad files are errors of one line."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import example, given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.weights.safetensors_io import (
    as_rows,
    find_weights,
    read_weights,
    write_safetensors,
)

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")
ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}


def write(path, arrays=ARRAYS):
    with path.open("wb") as file:
        write_safetensors(
            file,
            {name: as_rows(array) for name, array in arrays.items()},
            metadata={"made": "here"},
        )
    return path


def read_error(path):
    with pytest.raises(InputError) as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def assert_same(actual, expected=ARRAYS):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)
        assert actual[name].dtype == np.float32


def test_our_files_are_read_by_the_library(tmp_path):
    import safetensors.numpy

    path = write(tmp_path / "a.safetensors")
    assert_same(read_weights(path))
    assert_same(safetensors.numpy.load_file(path))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"made": "here"}


def test_files_of_the_library_are_read(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({**ARRAYS, "half": np.float16([2.0])}, tmp_path / "a.safetensors")
    assert_same(read_weights(tmp_path / "a.safetensors"), {**ARRAYS, "half": np.float32([2.0])})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "int64", "bool"])
def test_numbers_of_all_kinds_keep_their_values(tmp_path, dtype, suffix):
    """Of which numpy has no float8 and no bfloat16."""
    import safetensors.torch

    values = torch.tensor([[0.0, 1.0], [2.0, 3.5]]).to(getattr(torch, dtype))
    content = {"a": values, "b": torch.tensor([1.5])}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    else:
        safetensors.torch.save_file(content, path)
    assert_same(read_weights(path), {"a": values.float().numpy(), "b": np.float32([1.5])})


def test_other_kinds_of_numbers_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(other_dtype("F8_E8M0", [24]))
    assert "a is F8_E8M0, wanted float32" in read_error(path)


@pytest.mark.parametrize("inside", [None, "state_dict", "model", "net"])
def test_a_file_of_torch_save_is_read(tmp_path, inside):
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save({inside: tensors, "epoch": 3} if inside else tensors, tmp_path / "a.pth")
    assert_same(read_weights(tmp_path / "a.pth"))


def test_chunks_are_written_one_after_the_other(tmp_path):
    order = []

    def chunks():
        for row in ARRAYS["a.weight"]:
            order.append(len(order))
            yield row[None]

    with (tmp_path / "a.safetensors").open("wb") as file:
        write_safetensors(
            file, {"a.weight": ((2, 3), chunks), "b": as_rows(ARRAYS["b"])}, metadata={}
        )
    assert order == [0, 1]
    assert_same(read_weights(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_chunks_of_another_shape_are_an_error(tmp_path, shape):
    with (
        (tmp_path / "a.safetensors").open("wb") as file,
        pytest.raises(ValueError, match=r"a: .*wanted"),
    ):
        write_safetensors(file, {"a": (shape, lambda: [ARRAYS["a.weight"]])}, metadata={})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all" * 9])
def test_other_content_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert "damaged" in read_error(path) or "more than tensors" in read_error(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = write(tmp_path / "a.safetensors")
    if suffix == ".pth":
        path = tmp_path / "a.pth"
        torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged" in read_error(path)


class CallsMkdir:
    def __reduce__(self):
        return os.mkdir, (self.folder,)

    def __init__(self, folder):
        self.folder = folder


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, writer):
    path, trace = tmp_path / "a.pth", tmp_path / "ran"
    content = {"a": torch.zeros(2), "b": CallsMkdir(str(trace))}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "would run code" in read_error(path)
    assert not trace.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_named(tmp_path, value):
    broken = {**ARRAYS, "b": np.float32([value])}
    assert "NaN or infinity in b" in read_error(write(tmp_path / "a.safetensors", broken))


def test_other_paths_are_read_error(tmp_path):
    assert "no such file" in read_error(tmp_path / "missing.pth")
    (tmp_path / "a.h5").write_bytes(b"1")
    assert "wanted weights, .safetensors, .pth" in read_error(tmp_path / "a.h5")
    assert "holds no array" in read_error(write(tmp_path / "none.safetensors", {}))
    for content, said in (
        (
            {"a": 1, "epoch": 2},
            "holds a dictionary with the keys 'a', 'epoch'; wanted a state_dict",
        ),
        (
            {name: {"w": torch.zeros(1)} for name in ("net", "ema")},
            "holds several under the keys 'net', 'ema'; wanted a state_dict: names of tensors; "
            "save that one alone",
        ),
    ):
        torch.save(content, tmp_path / "keys.pth")
        assert said in read_error(tmp_path / "keys.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds list, wanted a state_dict" in read_error(tmp_path / "list.pth")


def test_weights_in_folders(tmp_path):
    assert find_weights(tmp_path / "a.pth") == tmp_path / "a.pth"
    with pytest.raises(InputError, match=r"wanted .*pytorch_model\.bin, it holds"):
        find_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(InputError, match=r"in several files .*write them as one: save_pretrained"):
        find_weights(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name


HEADER = {
    "__metadata__": {"made": "here"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]},
}
DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F64", "C64", "F4")


def file_bytes(header, *, length=None, data=bytes(range(28))):
    length = len(header) if length is None else length
    return struct.pack("<Q", length) + header + data


def other_dtype(dtype, shape, data=bytes(24)):
    values = {"dtype": dtype, "shape": shape, "data_offsets": [0, 24]}
    return file_bytes(json.dumps({"a": values}).encode(), data=data)


@given(
    damaged_json(HEADER).map(lambda text: file_bytes(text.encode()))
    | damaged_bytes(json.dumps(HEADER).encode()).map(file_bytes)
    | damaged_bytes(file_bytes(json.dumps(HEADER).encode()))
    | st.integers(0, 2**64 - 1).map(
        lambda length: file_bytes(json.dumps(HEADER).encode(), length=length)
    )
    | st.builds(other_dtype, st.sampled_from(DTYPES), st.lists(st.integers(0, 24), max_size=3))
    | st.binary(max_size=60)
)
@example(file_bytes(json.dumps(HEADER).encode()))
@example(file_bytes(b"[" * 100_000))
@example(other_dtype("F8_E4M3", [24]))
@example(other_dtype("BF16", [12]))
@example(other_dtype("F64", [3], np.full(3, 1e300).tobytes()))
def test_any_damaged_file_is_arrays_or_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    arrays = result_or_one_line(lambda: read_weights(path))
    for array in (arrays or {}).values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.lists(st.integers(0, 4), min_size=1, max_size=3),
        max_size=4,
    )
)
def test_any_arrays_are_read_as_written(tmp_path, shapes):
    shapes.pop("__metadata__", None)
    arrays = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    path = write(tmp_path / "a.safetensors", arrays)
    if arrays:
        assert_same(read_weights(path), arrays)
    else:
        assert "holds no array" in read_error(path)
