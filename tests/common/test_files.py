"""Files and folders that appear complete or not at all."""

import pytest

from sicot_jax.common.files import atomic_directory, atomic_file, file_lock, read_json, write_json
from sicot_jax.errors import InputError


def fail_half_way(context, write):
    """Raises ValueError in the block, after something was written."""
    with context as path:
        write(path)
        raise ValueError("half way")


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_one(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"  # numpy's savers add the suffix where it is missing
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="half way"):
        fail_half_way(atomic_file(path), lambda temporary: temporary.write_text("ne"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_back(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert read_json(tmp_path / "a.json", "numbers") == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError, wanted numbers; check the folder"),
        ("{", "JSONDecodeError, wanted numbers; check the folder"),
        ("[]", "holds no table, wanted numbers; check the folder"),
    ],
)
def test_json_that_is_none_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json", "numbers")


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "folder"
    with pytest.raises(ValueError, match="half way"):
        fail_half_way(atomic_directory(out), lambda partial: (partial / "file").touch())
    assert not list(tmp_path.iterdir())
    with atomic_directory(out) as partial:
        (partial / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(InputError, match="exists; give another --out"), atomic_directory(out):
        pass


class RefusedError(InputError):
    pass


def test_a_second_holder_is_refused_until_the_first_one_ends(tmp_path):
    path = tmp_path / ".lock"
    with file_lock(path, RefusedError("first")):
        with pytest.raises(RefusedError, match="second"), file_lock(path, RefusedError("second")):
            pass
        assert path.exists()
    with file_lock(path, RefusedError("third")):
        pass


def test_the_lock_is_freed_with_an_exception(tmp_path):
    with (
        pytest.raises(ValueError, match="inside"),
        file_lock(tmp_path / ".lock", RefusedError("first")),
    ):
        raise ValueError("inside")
    with file_lock(tmp_path / ".lock", RefusedError("second")):
        pass
