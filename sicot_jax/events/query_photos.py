"""Finds the photo that a list was asked with: kept by the service, or named by the shop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sicot_jax.errors import InputError


def query_photos(folder: Path) -> Callable[[str, str], Path | None]:
    """Returns a function that finds query photos in a folder.

    Args:
      folder: photos that `sicot serve --keep-queries` keeps (REQUEST_ID-RANDOM.photo), or photos
        named by their query_image_id (ID.jpg, any suffix).

    Returns:
      (request_id, query_image_id) -> path of the photo; None where there is not exactly one. A
      photo named by the request goes before one named by the image.

    Raises:
      InputError: `folder` is no folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no folder, wanted that of `sicot serve --keep-queries`, or of photos named "
            "by query_image_id"
        )
    paths_of: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem.rpartition("-")[0] if path.suffix == ".photo" else path.stem
        paths_of.setdefault(name, []).append(path)

    def find_photo(request_id: str, query_image_id: str) -> Path | None:
        paths = paths_of.get(request_id) or paths_of.get(query_image_id) or []
        return paths[0] if len(paths) == 1 else None

    return find_photo
