"""The record of a finished run: its folder without what is large, so that a repository can keep it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.report.runs import changes, read_finished, read_tested

LARGEST = 300 * 1024  # bytes of all files
TOP, LOG_LINES = 3, 200


def write_record(workdir: Path, out: Path) -> Path:
    """Config, results, curve and the best classes of every test photo: what `sicot report` reads.
    Returns `out`.

    As a run folder, without where things lie on this machine, and with smaller predictions: classes
      alone, the best three, in the order of (image id, label); of variants what changes from one to
      the next; the training counts as how many classes have each. Of many test photos the variants
      are left out, then all but the best class. Raises InputError for an unfinished run, or where
      even that is above 300 KiB.
    """
    if out.resolve() == workdir.resolve():
        raise InputError(
            f"{out}: a record beside its run would overwrite it; give another folder for records"
        )
    read_finished(workdir)
    tested = read_tested(workdir)
    values, classes = np.unique(tested.class_counts, return_counts=True)
    arrays = {
        "label": tested.label,
        "top_classes": tested.top_classes[:, :TOP],
        "label_count": tested.label_count,
        "count_values": values[::-1],
        "count_classes": classes[::-1],
    }
    variants = {}
    if tested.post_hoc:
        rows = np.array(list(tested.post_hoc.values()))
        variants = {
            "post_hoc": changes(tested.top_classes[:, 0], rows),
            "post_hoc_names": np.array(list(tested.post_hoc)),
        }
    texts = {
        "log.jsonl": _thinned((workdir / "log.jsonl").read_text()),
        "config.json": _without_places((workdir / "config.json").read_text()),
        "results.json": (workdir / "results.json").read_text(),  # the last: it makes a finished run
    }
    room = LARGEST - sum(map(len, texts.values()))
    best = {"top_classes": tested.top_classes[:, :1]}
    for kept in (arrays | variants, arrays, arrays | best):
        predictions = _packed(kept)
        if len(predictions) <= room:
            break
    else:
        raise InputError(
            f"{workdir}: its record would take {LARGEST - room + len(predictions):,} bytes, wanted {LARGEST:,}; train with a "
            "smaller eval.max_photos"
        )
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "predictions.npz": predictions,
        **{name: text.encode() for name, text in texts.items()},
    }
    for name, content in files.items():
        temporary = out / f"{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(out / name)
    return out


def _without_places(config: str) -> str:
    """config.json with the catalogue's name for its path, and of a run it went on from the last
    folders: not whose disk.
    """
    stored = json.loads(config)
    data, model = (stored["config"].get(name, {}) for name in ("data", "model"))
    if data.get("path"):
        data["path"] = Path(data["path"]).name
    if model.get("init_from"):
        model["init_from"] = "/".join(Path(model["init_from"]).parts[-3:])
    return json.dumps(stored, indent=1) + "\n"


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{name: _small(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    return file.getvalue()


def _small(array: np.ndarray) -> np.ndarray:
    """Whole numbers >= 0 in the smallest type that holds them."""
    return (
        array if array.dtype.kind == "U" else array.astype(np.min_scalar_type(array.max(initial=0)))
    )


def _thinned(log: str) -> str:
    """Validation lines, and training lines evenly, up to 200."""
    lines = log.splitlines()
    training = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "train"]
    left_out = set(training) - set(training[:: -(-len(training) // LOG_LINES) or 1])
    return "".join(f"{line}\n" for i, line in enumerate(lines) if i not in left_out)
