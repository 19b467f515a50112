"""Names of the leaves of a tree of arrays."""

from __future__ import annotations

from typing import Any


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, e.g. "visual/resnet/conv1/kernel".

    Args:
      path: keys from the root, as `jax.tree_util.tree_map_with_path` gives them.

    Returns:
      The keys, joined by "/".
    """
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
