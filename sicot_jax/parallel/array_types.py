"""Array annotations with shapes, from jaxtyping where it is installed.

An accelerator image that holds only jax, flax, optax, orbax and numpy trains from an array file and
has no jaxtyping: there the same names subscript to `Any`. Nothing at run time depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Num", "PyTree", "Shaped", "UInt8"]

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Key, Num, PyTree, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Key, Num, Shaped, UInt8
    except ImportError:

        class _Unchecked:
            """Stands for `Float`, `Int`, ...: `Float[Array, "B D"]` is `Any`."""

            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Bool = Float = Int = Key = Num = Shaped = UInt8 = _Unchecked


def __getattr__(name: str) -> Any:
    # These two import jax, which modules that annotate numpy arrays alone must not.
    if name == "Array":
        from jax import Array

        return Array
    if name == "PyTree":
        try:
            from jaxtyping import PyTree
        except ImportError:
            return Any
        return PyTree
    raise AttributeError(name)
