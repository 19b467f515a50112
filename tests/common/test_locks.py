"""The lock of a folder: one process at a time, free again after the block."""

import pytest

from sicot_jax.common.locks import file_lock
from sicot_jax.errors import InputError


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
