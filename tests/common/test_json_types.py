"""Types of JSON values against those that a dataclass declares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sicot_jax.common.json_types import check_field_types


@dataclasses.dataclass
class Stored:
    name: str
    sizes: list[list[int]]
    shares: dict[str, float]
    words: tuple[str, ...]
    limit: float | None
    weights: np.ndarray  # no type of JSON
    version: int = 1


GOOD = {
    "name": "a",
    "sizes": [[1], []],
    "shares": {"a": 0.5, "b": 1},
    "words": ["x"],
    "limit": None,
    "weights": [1, 2],
}


@pytest.mark.parametrize("change", [{}, {"limit": 2}, {"version": 2}, {"words": []}])
def test_values_of_their_types_pass(change):
    check_field_types(Stored, GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, r"name=None, wanted str"),
        ({"sizes": [1]}, r"sizes=\[1\], wanted list\[list\[int\]\]"),
        ({"sizes": [[True]]}, r"sizes="),
        ({"shares": {"a": "b"}}, r"shares="),
        ({"shares": {"a": 10**400}}, r"shares="),
        ({"shares": []}, r"shares="),
        ({"words": "text"}, r"words='text', wanted tuple"),
        ({"limit": "1"}, r"limit='1', wanted float \| None"),
        ({"version": 1.0}, r"version=1.0, wanted int"),
        ({"a\nb": 1}, r"unknown field 'a\\nb'$"),
    ],
)
def test_a_value_of_another_type_is_named(change, message):
    with pytest.raises(TypeError, match=message):
        check_field_types(Stored, GOOD | change)


def test_a_missing_field_is_named():
    with pytest.raises(TypeError, match="no field name"):
        check_field_types(Stored, {name: GOOD[name] for name in GOOD if name != "name"})
