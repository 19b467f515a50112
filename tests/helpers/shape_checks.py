"""Checks the array annotations of the package while tests run; the other types are mypy's job."""

import re
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_ARRAY = re.compile(r"\b(Bool|Float|Int|Key|Num|Shaped|UInt8)\[")
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its arguments and result checked where annotations have shapes."""
    annotations = getattr(function, "__annotations__", {})
    arrays = {name: kind for name, kind in annotations.items() if _ARRAY.search(str(kind))}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return _check(function)
