"""The photo that a list was asked with: a file that the service kept, or one that the shop named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sicot_jax.errors import InputError


def query_photos(folder: Path) -> Callable[[str, str], Path | None]:
    """(request_id, query_image_id) -> the file of the photo, None where there is not exactly one.

    A file is named by the request as `serve.queries` does (REQUEST_ID-RANDOM.photo), which goes
    first, or otherwise by the query_image_id (ID.jpg, any ending). InputError where `folder` is
    none.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no folder, wanted that of `sicot serve --keep-queries`, or of photos named by query_image_id"
        )
    named: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem.rpartition("-")[0] if path.suffix == ".photo" else path.stem
        named.setdefault(name, []).append(path)

    def photo(request_id: str, query_image_id: str) -> Path | None:
        paths = named.get(request_id) or named.get(query_image_id) or []
        return paths[0] if len(paths) == 1 else None

    return photo
