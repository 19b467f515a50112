"""Compares the accuracy of the service over HTTP with the offline evaluation.

Command:  python -m benchmarks.service_accuracy --workdir RUN --index INDEX
          (INDEX: built from RUN)

Every test photo of the run's catalogue is sent as the catalogue has it, POST /v1/recognize?k=3.
Offline: top-1 and top-3 of RUN/results.json, as `sicot evaluate run` computed them. The last column
counts photos whose best product differs.
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
from benchmarks.finished_runs import open_run_catalog
from benchmarks.service_process import ServiceProcess
from sicot_jax.training.run import read_run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args(argv)
    timing.print_machine()
    run = read_run(options.workdir)
    catalog = open_run_catalog(run)
    records = catalog.splits["test"]
    with np.load(options.workdir / "predictions.npz") as stored:
        offline = dict(zip(stored["image_id"].tolist(), stored["top_classes"][:, :3], strict=True))
    queries = {
        "through the service, categories aside": "&any_category=true",
        "through the service": "",
    }
    correct, differing = (
        {name: np.zeros(2) for name in ("offline", *queries)},
        dict.fromkeys(queries, 0),
    )
    service = ServiceProcess.start_sicot(
        options.index, "--max-wait-ms=60000", f"--engine={options.engine}"
    )
    try:
        service.wait()
        connection = service.connect()
        for i in tqdm(range(len(records)), disable=None):
            record = records[i]
            expected = [catalog.classes.sku[c] for c in offline[record["image_id"]]]
            correct["offline"] += record["sku"] == expected[0], record["sku"] in expected
            for name, parameters in queries.items():
                url = f"/v1/recognize?k=3&similar=0{parameters}"
                connection.request("POST", url, record["image"], {"Content-Type": "image/jpeg"})
                skus = [p["sku"] for p in _answer(connection)["products"]]
                correct[name] += record["sku"] == skus[0], record["sku"] in skus
                differing[name] += skus[0] != expected[0]
        connection.close()
    finally:
        service.stop()
    rows = [
        [name, *(f"{100 * x / len(records):.2f}" for x in skus), str(differing.get(name, ""))]
        for name, skus in correct.items()
    ]
    header = [
        f"{catalog.name}, {len(records)} test photos",
        "top-1, %",
        "top-3, %",
        "different best product",
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
