"""Accuracy through the service against the offline evaluation: every test photo of a run's
catalogue, sent over HTTP.

Command:  python -m benchmarks.service_accuracy --workdir RUN --index INDEX      (INDEX: built from
  RUN)

Offline: top-1 and top-3 of RUN/results.json, as `sicot evaluate` found them. Through the service:
  photos as the catalogue has them, POST /v1/recognize?k=3. Told too: photos whose best product is
  another one.
"""

from __future__ import annotations

import argparse
import http.client
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import timing
from benchmarks.finished_runs import catalog_of
from benchmarks.service_process import Service
from sicot_jax.training import run as runs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args(argv)
    timing.print_machine()
    run = runs.read_run(options.workdir)
    catalog = catalog_of(run)
    records = catalog.splits["test"]
    with np.load(options.workdir / "predictions.npz") as stored:
        offline = dict(zip(stored["image_id"].tolist(), stored["top_classes"][:, :3], strict=True))
    asked = {
        "through the service, categories aside": "&any_category=true",
        "through the service": "",
    }
    hits, others = {name: np.zeros(2) for name in ("offline", *asked)}, dict.fromkeys(asked, 0)
    service = Service.ours(options.index, "--wait-ms=60000", f"--engine={options.engine}")
    try:
        service.wait()
        connection = service.connect()
        for i in tqdm(range(len(records)), disable=None):
            record = records[i]
            expected = [catalog.classes.sku[c] for c in offline[record["image_id"]]]
            hits["offline"] += record["sku"] == expected[0], record["sku"] in expected
            for name, more in asked.items():
                address = f"/v1/recognize?k=3&similar=0{more}"
                connection.request("POST", address, record["image"], {"Content-Type": "image/jpeg"})
                found = [p["sku"] for p in _answer(connection)["products"]]
                hits[name] += record["sku"] == found[0], record["sku"] in found
                others[name] += found[0] != expected[0]
        connection.close()
    finally:
        service.stop()
    rows = [
        [name, *(f"{100 * x / len(records):.2f}" for x in found), str(others.get(name, ""))]
        for name, found in hits.items()
    ]
    header = [
        f"{catalog.name}, {len(records)} test photos",
        "top-1, %",
        "top-3, %",
        "another best product",
    ]
    timing.print_table("Accuracy", header, rows)


def _answer(connection: http.client.HTTPConnection) -> dict:
    response = connection.getresponse()
    body = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {body}")
    return body


if __name__ == "__main__":
    main()
