"""Table of finished runs in Parquet, which `sicot report runs` reads like run folders.

`NAME.parquet` has a row per run: where it comes from (config, hashes, commit, hardware), its
accuracies, its validation log, and whether each test photo was a hit, a bit per photo. Labels and
training counts of the test photos are shared by many runs and are next to it, in
`test_sets.parquet`.
Predicted classes, embeddings and training losses are not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from sicot_jax.common.files import atomic_file
from sicot_jax.common.text import one_line
from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.errors import InputError
from sicot_jax.report.runs import GROUPS, FinishedRun, TestSet, run_accuracy

SUFFIX = ".parquet"
TEST_SETS_FILE = f"test_sets{SUFFIX}"
SWEEP_FOLDERS = ("after_rate_", "rate_", "seed_")  # below the folder of a variant in a sweep

_VALIDATION_FIELDS = tuple(f"{group}_top1" for group in ("overall", "head", "tail", "class_mean"))
_VALIDATION = pa.struct([("step", pa.float64()), *((f, pa.float64()) for f in _VALIDATION_FIELDS)])
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "variant", "data_set")),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("validation_top1", pa.float64()),
        *((f"{group}_top{top}", pa.float64()) for top in (1, 3) for group in GROUPS),
        *((name, pa.string()) for name in ("config_hash", "data_hash", "triplets_hash")),
        *((name, pa.string()) for name in ("class_table_hash", "test_set_hash")),
        *((name, pa.string()) for name in ("commit", "version", "hardware", "when")),
        *((name, pa.string()) for name in ("config", "results")),  # JSON
        ("validation", pa.list_(_VALIDATION)),
        ("test_set", pa.string()),  # id in test_sets.parquet
        ("top1_hits", pa.binary()),
        ("top3_hits", pa.binary()),
        ("adjusted_hits", pa.map_(pa.string(), pa.binary())),
    ]
)
_TEST_SET_SCHEMA = pa.schema(
    [
        ("test_set", pa.string()),
        *((name, pa.list_(pa.int32())) for name in ("label", "label_count", "class_counts")),
    ]
)


def is_run_table(path: Path) -> bool:
    """Returns whether a path names a run table, there or not.

    Args:
      path: input of a report.

    Returns:
      True for `*.parquet`.
    """
    return path.suffix == SUFFIX


def add_to_run_table(path: Path, runs: Sequence[FinishedRun]) -> None:
    """Adds runs to a table, which is made where it is missing; rows of the same names are replaced.

    Processes that write to one folder wait for each other; readers never see half a table.

    Args:
      path: table to write, `*.parquet`; its test sets go into `test_sets.parquet` next to it.
      runs: runs to add; their names are the rows' names.

    Raises:
      InputError: the table there is not a run table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        new = {run.name for run in runs}
        rows = [row for row in _rows(path, _SCHEMA) if row["name"] not in new]
        rows += [_row_of(run) for run in runs]
        sets = {
            row["test_set"]: row for row in _rows(path.parent / TEST_SETS_FILE, _TEST_SET_SCHEMA)
        }
        for run in runs:
            sets.setdefault(_test_set_id(run.test_set), _test_set_row(run.test_set))
        # The test sets first: a row never refers to one that is missing.
        _write(path.parent / TEST_SETS_FILE, list(sets.values()), _TEST_SET_SCHEMA)
        _write(path, sorted(rows, key=lambda row: row["name"]), _SCHEMA)


def read_run_table(path: Path, select: Sequence[str] = ()) -> list[FinishedRun]:
    """Reads runs of a table.

    Args:
      path: table written by `add_to_run_table`.
      select: patterns of names or of folders of names, such as `grocery_small/*/rate_0.1`; all runs
        without any.

    Returns:
      Runs in the order of the patterns, then of names.

    Raises:
      InputError: no such table, one of another kind, or a pattern that no run matches.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file, wanted a run table of `sicot sweep`")
    rows = {row["name"]: row for row in _rows(path, _SCHEMA)}
    chosen = dict.fromkeys(rows if not select else ())
    for pattern in select:
        matches = [name for name in rows if _matches(name, pattern)]
        if not matches:
            folders = sorted({name.partition("/")[0] for name in rows})
            raise InputError(
                f"{path}: no run matches {pattern!r}; runs are below {', '.join(folders)[:200]}"
            )
        chosen.update(dict.fromkeys(matches))
    wanted = {rows[name]["test_set"] for name in chosen}
    test_sets = {
        row["test_set"]: TestSet(
            *(np.asarray(row[name], np.int64) for name in _TEST_SET_SCHEMA.names[1:])
        )
        for row in _rows(path.parent / TEST_SETS_FILE, _TEST_SET_SCHEMA)
        if row["test_set"] in wanted
    }
    if missing := wanted - test_sets.keys():
        raise InputError(
            f"{path.parent / TEST_SETS_FILE}: lacks test set {min(missing)} of {path.name}; copy "
            "both files"
        )
    return [_run_of(rows[name], test_sets) for name in chosen]


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns a hash that is equal for configs that compute the same.

    Args:
      config: config fields by dotted name, as JSON has them.

    Returns:
      SHA-256 in hex of all fields but those that only say where and how fast a run runs.
    """
    fields = {k: v for k, v in portable_config(config).items() if k not in FREE_ON_RESUME}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without the paths of this machine.

    Args:
      config: config fields by dotted name.

    Returns:
      The fields, `data.path` by its last part, `model.init_from` by its last three.
    """
    portable = dict(config)
    for name, parts in {"data.path": 1, "model.init_from": 3}.items():
        if portable.get(name):
            portable[name] = "/".join(Path(portable[name]).parts[-parts:])
    return portable


def is_sweep_folder(name: str) -> bool:
    """Returns whether a folder says learning rate or seed of a sweep's runs, not their variant.

    Args:
      name: one part of a run's name.

    Returns:
      True for `rate_0.1`, `after_rate_0.1` and `seed_0`.
    """
    return name.startswith(SWEEP_FOLDERS)


def _matches(name: str, pattern: str) -> bool:
    parts = PurePosixPath(name).parts
    wanted = PurePosixPath(pattern).parts
    return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _row_of(run: FinishedRun) -> dict[str, Any]:
    results, config, hashes = run.results, portable_config(run.config), run.results["hashes"]
    variant = [part for part in run.name.split("/") if not is_sweep_folder(part)]
    tops = (1, 3) if run.top3_hits is not None else (1,)
    accuracies = {
        f"{group}_top{top}": run_accuracy(run, group, top=top) for top in tops for group in GROUPS
    }
    log_fields = ("step", *_VALIDATION_FIELDS)
    return {
        "name": run.name,
        "variant": variant[-1] if variant else run.name,
        "data_set": (results.get("catalog") or {}).get("name", ""),
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "validation_top1": run.best_validation_top1 if run.validation_log else None,
        **accuracies,
        "config_hash": config_hash(config),
        "data_hash": hashes["data"],
        "triplets_hash": run.triplets_hash,
        "class_table_hash": hashes["class_table"],
        "test_set_hash": hashes["test_set"],
        **{name: results.get(name, "") for name in ("commit", "version", "hardware", "when")},
        "config": json.dumps(config, sort_keys=True),
        "results": json.dumps(dict(results)),
        "validation": [
            {name: record.get(name) for name in log_fields} for record in run.validation_log
        ],
        "test_set": _test_set_id(run.test_set),
        "top1_hits": _packed(run.top1_hits),
        "top3_hits": _packed(run.top3_hits) if run.top3_hits is not None else None,
        "adjusted_hits": [(name, _packed(hits)) for name, hits in run.adjusted_hits.items()],
    }


def _run_of(row: Mapping[str, Any], test_sets: Mapping[str, TestSet]) -> FinishedRun:
    test_set = test_sets[row["test_set"]]

    def unpacked(bits: bytes) -> np.ndarray:
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=len(test_set.label)).astype(bool)

    return FinishedRun(
        name=row["name"],
        config=json.loads(row["config"]),
        results=json.loads(row["results"]),
        validation_log=[
            {name: value for name, value in record.items() if value is not None}
            for record in row["validation"]
        ],
        test_set=test_set,
        top1_hits=unpacked(row["top1_hits"]),
        top3_hits=unpacked(row["top3_hits"]) if row["top3_hits"] is not None else None,
        adjusted_hits={name: unpacked(bits) for name, bits in row["adjusted_hits"]},
        triplets_hash=row["triplets_hash"],
    )


def _packed(hits: np.ndarray) -> bytes:
    return np.packbits(hits).tobytes()


def _test_set_id(test_set: TestSet) -> str:
    """Returns a hash of the arrays, equal for equal test sets."""
    digest = hashlib.sha256()
    for array in (test_set.label, test_set.label_count, test_set.class_counts):
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _test_set_row(test_set: TestSet) -> dict[str, Any]:
    return {
        "test_set": _test_set_id(test_set),
        "label": test_set.label,
        "label_count": test_set.label_count,
        "class_counts": test_set.class_counts,
    }


def _rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Rows of a table, none where there is no file."""
    if not path.exists():
        return []
    try:
        table = parquet.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {one_line(error)}; wanted a run table") from error
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; wanted a run table of `sicot sweep`"
        )
    return table.select(schema.names).to_pylist()


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_file(path) as partial:
        table = pa.Table.from_pylist(rows, schema)
        parquet.write_table(table, partial, compression="zstd", compression_level=19)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder, one process at a time, without leaving a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
