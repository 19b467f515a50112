"""Versions of an index, which one is in use, and the write lock."""

import pytest

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
