"""The record of a finished run: its folder without what is large, so that a repository can keep it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.report.finished import changes, read_finished, read_tested

LARGEST = 300 * 1024  # bytes of all files
TOP, LOG_LINES = 3, 200


def write_record(workdir: Path, out: Path) -> Path:
    """Config, results, curve and the best classes of every test photo: what `sicot report` reads. Returns `out`.

    As a run folder, with smaller predictions: classes alone, the best three, in the order of (image id, label); of variants
    what changes from one to the next; the training counts as how many classes have each. Raises InputError for an unfinished
    run, or where that is above 300 KiB.
    """
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
    if tested.post_hoc:
        arrays["post_hoc"] = changes(tested.top_classes[:, 0], np.array(list(tested.post_hoc.values())))
        arrays["post_hoc_names"] = np.array(list(tested.post_hoc))
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "predictions.tmp.npz"
    np.savez_compressed(temporary, **{name: _small(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    texts = {
        "log.jsonl": _thinned((workdir / "log.jsonl").read_text()),
        "config.json": (workdir / "config.json").read_text(),
    }
    results = (workdir / "results.json").read_text()
    size = temporary.stat().st_size + len(results) + sum(map(len, texts.values()))
    if size > LARGEST:
        temporary.unlink()
        raise InputError(f"{workdir}: its record would take {size:,} bytes, wanted {LARGEST:,}; set eval.max_photos")
    temporary.replace(out / "predictions.npz")
    for name, text in (*texts.items(), ("results.json", results)):  # results last: they make it a finished run
        (out / name).write_text(text)
    return out


def _small(array: np.ndarray) -> np.ndarray:
    """Whole numbers >= 0 in the smallest type that holds them."""
    return array if array.dtype.kind == "U" else array.astype(np.min_scalar_type(array.max(initial=0)))


def _thinned(log: str) -> str:
    """Validation lines, and training lines evenly, up to 200."""
    lines = log.splitlines()
    training = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "train"]
    kept = set(training[:: -(-len(training) // LOG_LINES) or 1])
    return "".join(f"{line}\n" for i, line in enumerate(lines) if i in kept or i not in set(training))
