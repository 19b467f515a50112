"""Which file is the photo of a list."""

import pytest

from sicot_jax.errors import InputError
from sicot_jax.events.query_photos import query_photos
from sicot_jax.serve.query_store import QueryStore


def test_the_request_goes_before_the_name_and_two_are_none(tmp_path):
    folder = tmp_path / "kept"
    queries = QueryStore(folder, days=1)
    for request in ("r-1", "r2", "r2"):
        queries.save(request, b"")
    for name in ("q1.jpg", "q2.jpg", "q2.png"):
        (folder / name).touch()
    find = query_photos(folder)
    assert find("r-1", "q1").name.startswith("r-1-")
    assert find("r2", "q1") is None  # two photos under one id: which one is not known
    assert find("r3", "q1").name == "q1.jpg"
    assert find("r3", "q2") is find("r3", "q3") is find("", "") is None
    with pytest.raises(InputError, match="no folder, wanted that of `sicot serve --keep-queries`"):
        query_photos(folder / "q1.jpg")
