"""Damaged files for property tests, and the rule that reading one ends in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

from sicot_jax.errors import InputError

Result = TypeVar("Result")
# Text and numbers that readers get wrong most easily.
_AWKWARD = (b"", b"\0", b"\n", b"\r\n", b'"', b"'", b",", b"{", b"[", b"}", b"]", b":", b"\\u0000")
_AWKWARD += (b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"NaN", b"1e999", b"-1", b"null")
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "a\nb", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws content with up to three parts replaced, removed, repeated or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 20)))
        part = draw(st.sampled_from(_AWKWARD) | st.binary(max_size=8))
        kind = draw(st.sampled_from(("replace", "repeat", "cut")))
        if kind == "replace":
            content = content[:start] + part + content[stop:]
        elif kind == "repeat":
            content = content[:stop] + content[start:]
        else:
            content = content[:start]
    return content


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> str:
    """Draws JSON text of a value with one part, at any depth, removed, renamed or replaced."""
    value = json.loads(json.dumps(value))
    parent, key = None, None
    inner = value
    while isinstance(inner, dict | list) and inner and (parent is None or draw(st.booleans())):
        parent = inner
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = inner[key]
    if parent is None:
        return json.dumps(draw(JSON_VALUES))
    kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
    if kind == "replace":
        parent[key] = draw(JSON_VALUES)
    elif kind == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=6))] = parent.pop(key)
    return json.dumps(value)


def result_or_one_line(read: Callable[[], Result]) -> Result | None:
    """Returns what `read` returns, or None for an InputError of one line; fails for all else."""
    try:
        return read()
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    return None
