"""API keys and stored query photos."""

import os
import time

import pytest

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.serve.api_keys import add_api_key, read_api_keys
from sicot_jax.serve.state import QueryStore


def test_keys_are_created_and_resolved(tmp_path, capsys):
    """Created by the command, stored as a hash that others cannot read, resolved to a name."""
    path = tmp_path / "keys"
    keys = []
    for name in ("shop", "app"):
        assert cli.main(["serve-key", name, "--file", str(path)]) == 0
        keys.append(capsys.readouterr().out.split("\n")[0])
    stored = read_api_keys(path)
    assert [stored.owner(key) for key in keys] == ["shop", "app"]
    assert stored.owner("") is stored.owner(keys[0] + "x") is None
    assert not any(key in path.read_text() for key in keys)
    assert path.stat().st_mode & 0o077 == 0
    assert cli.main(["serve-key", "shop", "--file", str(path)]) == cli.INPUT_ERROR
    assert "shop has a key" in capsys.readouterr().err
    assert cli.main(["serve-key", "a b", "--file", str(path)]) == cli.INPUT_ERROR


def test_a_photo_that_cannot_be_stored_is_logged(tmp_path, caplog):
    kept = QueryStore(tmp_path / "kept", days=2)
    (tmp_path / "kept").rmdir()
    kept.save("id", b"1")
    assert "id not kept" in caplog.text


def test_keys_are_added_to_a_file_that_was_edited(tmp_path):
    """Without an end of its last line; with comments alone."""
    path = tmp_path / "keys"
    path.write_text("# ours")
    keys = [add_api_key(path, "a")]
    path.write_text(path.read_text().rstrip("\n"))
    keys.append(add_api_key(path, "b"))
    assert [read_api_keys(path).owner(key) for key in keys] == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "shop 1234\n", f"a {'0' * 64}\na {'1' * 64}\n", "\x00\xff"]
)
def test_a_file_that_holds_no_keys(tmp_path, text):
    (tmp_path / "keys").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"wanted 'NAME SHA256'|no key in it|make keys"):
        read_api_keys(tmp_path / "keys")
    with pytest.raises(InputError, match="make keys with"):
        read_api_keys(tmp_path / "other")


def test_kept_photos_are_removed_after_their_days(tmp_path):
    kept = QueryStore(tmp_path / "kept", days=2)
    kept.save("old", b"1")
    (old,) = (tmp_path / "kept").iterdir()
    long_ago = time.time() - 3 * 86_400
    os.utime(old, (long_ago, long_ago))
    for content in (b"2", b"3"):
        kept.save("new", content)  # the same id twice: a client's choice
    kept.remove_expired()  # within the hour: not yet
    assert old.exists()
    QueryStore(tmp_path / "kept", days=2)  # at the start
    assert sorted(path.read_bytes() for path in (tmp_path / "kept").iterdir()) == [b"2", b"3"]
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
