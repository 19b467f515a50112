"""Measures time, memory and estimation error of `sicot events import` and `triplets`.

The log is simulated, so that the true examination propensities are known.

Command:  python -m benchmarks.click_logs --folder DIR --requests 3850000
Needs:    duckdb; 2 GB of disk for ten million rows.

The log stays in DIR and is not made again. One thread. The peak counts pages of files, "anonymous"
does not.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from pyarrow import parquet

from benchmarks import timing
from sicot_jax.events import simulator
from sicot_jax.events.simulator import TYPICAL_NOISE, ClickModel

QUERIES, PRODUCTS, POSITIONS = 20_000, 100_000, 20


def run_measured(*arguments: str) -> tuple[float, float, int, int]:
    """Returns seconds, CPU seconds, peak MiB and peak anonymous MiB of a command."""
    before, began, anonymous = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "sicot_jax.cli", "events", *arguments])
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        memory = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+)", status.read_text()))
        peak, anonymous = (
            max(peak, int(memory.get("VmHWM", 0))),
            max(anonymous, int(memory.get("RssAnon", 0))),
        )
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, peak // 1024, anonymous // 1024


def read_positions(report: Path) -> np.ndarray:
    """Returns [R, 4] by position: views, propensity, weight, weighted clicks in per cent."""
    rows = [
        line.strip("| ").split(" | ")
        for line in report.read_text().splitlines()
        if re.match(r"\| *\d+ \|", line)
    ]
    return np.array(
        [[float(row[i].split()[0].replace(",", "")) for i in (1, 3, 4, 5)] for row in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=3_850_000)
    parser.add_argument("--memory-mb", type=int, default=1000)
    args = parser.parse_args()
    timing.print_machine()
    args.folder.mkdir(parents=True, exist_ok=True)
    log, imported, out = (
        args.folder / "log.parquet",
        args.folder / "imported",
        args.folder / "triplets.parquet",
    )
    results, model = (
        simulator.random_results(
            num_queries=QUERIES, num_products=PRODUCTS, num_positions=POSITIONS
        ),
        ClickModel(),
    )
    if not log.exists():
        simulator.write_simulated_log(
            results, args.folder / "partial", model, TYPICAL_NOISE, num_requests=args.requests
        )
        (args.folder / "partial").rename(log)
    rows = parquet.read_metadata(log).num_rows
    print(f"{rows:,} rows, {log.stat().st_size >> 20} MiB", flush=True)
    shutil.rmtree(imported, ignore_errors=True)
    for path in (out, out.with_suffix(".md")):
        path.unlink(missing_ok=True)
    resources = ("--threads", "1", "--memory-mb", str(args.memory_mb))
    commands = {
        "import": ("import", str(log), "--out", str(imported)),
        "triplets": (
            "triplets",
            str(imported),
            "--out",
            str(out),
            "--max-weight",
            str(POSITIONS),
        ),
    }
    costs = [
        [name, *(f"{value:,.0f}" for value in run_measured(*arguments, *resources))]
        for name, arguments in commands.items()
    ]
    timing.print_table("Cost", ("command", "s", "s of CPU", "peak, MiB", "anonymous, MiB"), costs)
    estimated, truth = (
        read_positions(out.with_suffix(".md")),
        model.propensity(POSITIONS),
    )
    relevance = (
        results.click_probability.mean(0) * (1 - model.shuffled_share)
        + results.click_probability.mean() * model.shuffled_share
    )
    rows_by_position = []
    for position in range(POSITIONS):
        ratio, relative_clicks = (
            estimated[position, 1] / truth[position],
            estimated[position, 3] / 100 / relevance[position],
        )
        rows_by_position.append(
            [
                str(position + 1),
                f"{truth[position]:.3f}",
                f"{estimated[position, 1]:.3f}",
                f"{ratio:.3f}",
                f"{relative_clicks:.3f}",
            ]
        )
    header = (
        "position",
        "true propensity",
        "estimated",
        "estimated / true",
        "weighted clicks / relevance",
    )
    timing.print_table("Positions", header, rows_by_position)
    print(re.sub(r"(?s)\| position .*", "", out.with_suffix(".md").read_text()))
    print((imported / "report.md").read_text())


if __name__ == "__main__":
    main()
