"""Versions of an index, which one is in use, and the write lock."""

import dataclasses
import json

import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import example, given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout


def publish(index, text):
    folder = index / layout.BUILDING
    folder.mkdir()
    (folder / "file").write_text(text)
    with layout.write_lock(index):
        return layout.publish_version(index, folder)


def test_publish_keeps_the_previous_version_alone(tmp_path):
    for text in "abcd":
        assert (publish(tmp_path, text) / "file").read_text() == text
    assert sorted(entry.name for entry in tmp_path.glob("v*")) == ["v000003", "v000004"]
    assert layout.current_version(tmp_path).name == "v000004"


def test_publish_after_a_rollback(tmp_path):
    """`current` was set back by hand: that version is kept, the newer one is removed."""
    for text in "ab":
        publish(tmp_path, text)
    (tmp_path / "current").write_text("v000001\n")
    assert publish(tmp_path, "c").name == "v000003"
    assert sorted(entry.name for entry in tmp_path.glob("v*")) == ["v000001", "v000003"]


def test_write_lock_is_exclusive(tmp_path):
    with (
        layout.write_lock(tmp_path),
        pytest.raises(InputError, match="another process is changing it"),
        layout.write_lock(tmp_path),
    ):
        pass
    with layout.write_lock(tmp_path):
        pass


def test_open_current_retries_a_replaced_version(tmp_path):
    publish(tmp_path, "a")
    seen = []

    def opened(folder):
        seen.append(folder.name)
        if len(seen) == 1:
            publish(tmp_path, "b")
            publish(tmp_path, "c")  # removes the first
            raise FileNotFoundError(folder)
        return (folder / "file").read_text()

    assert layout.open_current(tmp_path, opened) == "c"
    assert seen == ["v000001", "v000003"]
    with pytest.raises(ZeroDivisionError):
        layout.open_current(tmp_path, lambda _: 1 / 0)


def test_unreadable_manifests_are_refused(tmp_path):
    with pytest.raises(InputError, match="wanted the manifest of a product index"):
        layout.read_index_manifest(tmp_path)
    (tmp_path / layout.MANIFEST).write_text('{"format": 99}')
    with pytest.raises(
        InputError, match=f"format 99, this version reads {layout.FORMAT}; build the index again"
    ):
        layout.read_index_manifest(tmp_path)


MANIFEST = layout.IndexManifest(
    model_sha256="00",
    run="run",
    results_sha256="",
    data_hash="11",
    width=16,
    bits=64,
    code_kind="pca",
    num_photos=12,
    num_products=4,
    category_ranges={"hats": [0, 12]},
    sha256={layout.FEATURES: "22"},
    created="2026-01-01T00:00:00",
    version="0.1.0",
)
STORED = dataclasses.asdict(MANIFEST)


def test_a_manifest_is_read_as_written(tmp_path):
    layout.write_index_manifest(tmp_path, MANIFEST)
    assert layout.read_index_manifest(tmp_path) == MANIFEST


@given(
    damaged_json(STORED).map(str.encode)
    | damaged_bytes(json.dumps(STORED, indent=1).encode())
    | st.binary(max_size=60)
)
@example(json.dumps(STORED | {"a\nb": 1}).encode())
@example(json.dumps(STORED | {"format": "a\nb"}).encode())
def test_a_damaged_manifest_is_an_error_of_one_line_or_has_its_types(tmp_path, content):
    (tmp_path / layout.MANIFEST).write_bytes(content)
    read = result_or_one_line(lambda: layout.read_index_manifest(tmp_path))
    for name, value in STORED.items():
        assert read is None or type(getattr(read, name)) is type(value)


@given(st.binary(max_size=30) | st.text(max_size=30).map(lambda text: text.encode()))
@example(b"v000001\n")
@example(b"v00000\xb2")
def test_any_bytes_in_current_are_a_version_or_an_error_of_one_line(tmp_path, content):
    (tmp_path / "v000001").mkdir(exist_ok=True)
    (tmp_path / layout.CURRENT).write_bytes(content)
    version = result_or_one_line(lambda: layout.current_version(tmp_path))
    assert version in (None, tmp_path / "v000001")
