"""Reads a run folder (config, results, log, predictions) into a `FinishedRun`."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json
from sicot_jax.config import read_flat_config
from sicot_jax.errors import InputError
from sicot_jax.report.runs import FinishedRun, TestSet

DIVERGED_FILE = "diverged.json"  # stands in a run folder whose training diverged
_PREDICTIONS = ("label", "image_id", "top_classes", "train_counts")
_ADJUSTED = ("post_hoc_names", "post_hoc")


def read_run_folder(workdir: Path) -> FinishedRun:
    """Reads a finished run.

    Args:
      workdir: run folder with `config.json`, `results.json`, `log.jsonl` and `predictions.npz`.

    Returns:
      The run, named after its folder, with the test photos sorted by (image id, label).

    Raises:
      InputError: the run is not finished, or one of its files is damaged.
    """
    try:
        for name in ("results.json", "config.json"):
            if not (workdir / name).exists():
                raise FileNotFoundError(2, "missing", name)
        results = read_json(workdir / "results.json", "the results of a finished run")
        description = read_json(workdir / "config.json", "the config of a run")
        config = read_flat_config(workdir / "config.json")
        predictions = _read_predictions(workdir)
        log = (workdir / "log.jsonl").read_text()
    except FileNotFoundError as error:
        raise InputError(
            f"{workdir}: not a finished run, {Path(error.filename).name} is missing; train it to "
            "its end"
        ) from error
    return FinishedRun(
        name=workdir.name,
        config=config,
        results=results,
        validation_log=_validation_log(workdir, log),
        triplets_hash=description.get("data", {}).get("triplets", ""),
        **predictions,
    )


def _validation_log(workdir: Path, log: str) -> list[dict[str, float]]:
    validations = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{workdir}/log.jsonl: a line is no JSON ({line[:40]!r}); remove that line"
            ) from error
        if record.pop("kind") == "validation":
            validations.append(record)
    return validations


def _read_predictions(workdir: Path) -> dict[str, Any]:
    """Reads `predictions.npz`: test set and hits, as arguments of `FinishedRun`."""
    remedy = f"write it again: sicot evaluate run --workdir={workdir}"
    with (workdir / "predictions.npz").open("rb") as file:
        try:
            with np.load(file) as arrays:
                stored = {
                    name: arrays[name] for name in (*_PREDICTIONS, *_ADJUSTED) if name in arrays
                }
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise InputError(f"{file.name} is damaged ({error}); {remedy}") from error
    if missing := [name for name in _PREDICTIONS if name not in stored]:
        raise InputError(f"{workdir}/predictions.npz lacks {', '.join(missing)}; {remedy}")
    order = np.lexsort((stored["label"], stored["image_id"]))
    label = stored["label"][order].astype(np.int64)
    top_classes, counts = stored["top_classes"][order], stored["train_counts"].astype(np.int64)
    hits = top_classes == label[:, None]
    adjusted = {}
    if "post_hoc_names" in stored:
        classes = stored["post_hoc"][order].T
        adjusted = dict(zip(stored["post_hoc_names"].tolist(), classes == label, strict=True))
    return {
        "test_set": TestSet(label, counts[label], np.sort(counts)[::-1]),
        "top1_hits": hits[:, 0],
        "top3_hits": hits[:, :3].any(-1) if hits.shape[1] > 1 else None,
        "adjusted_hits": adjusted,
    }
