"""Time and memory of `sicot events import` and `triplets` on a generated log, and how near what
they find is to its truth.

Command:  python -m benchmarks.click_logs --folder DIR --requests 3850000
Needs:    duckdb; 2 GB of disk for ten million rows.

The log stays in DIR, and is not made again. One thread; the peak counts pages of files, "its own"
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
from sicot_jax.events import simulator as visitors

QUERIES, PRODUCTS, PLACES = 20_000, 100_000, 20


def measured(*arguments: str) -> tuple[float, float, int, int]:
    """A command's seconds, seconds of CPU, MiB at the most, and of these its own (not pages of
    files).
    """
    before, began, own = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    running = subprocess.Popen([sys.executable, "-m", "sicot_jax.cli", "events", *arguments])
    status, peak = Path(f"/proc/{running.pid}/status"), 0
    while running.poll() is None:
        found = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+)", status.read_text()))
        peak, own = max(peak, int(found.get("VmHWM", 0))), max(own, int(found.get("RssAnon", 0)))
        time.sleep(0.1)
    if running.returncode:
        sys.exit(running.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, peak // 1024, own // 1024


def places_of(report: Path) -> np.ndarray:
    """[R, 4]: views, chance of looking, weight, weighted clicks in per cent, of each place."""
    rows = [
        line.strip("| ").split(" | ")
        for line in report.read_text().splitlines()
        if re.match(r"\| \d+ \|", line)
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
    log, made, out = (
        args.folder / "log.parquet",
        args.folder / "imported",
        args.folder / "triplets.parquet",
    )
    lists, model = (
        visitors.generated_lists(queries=QUERIES, products=PRODUCTS, places=PLACES),
        visitors.Behaviour(),
    )
    if not log.exists():
        visitors.write(
            lists, args.folder / "partial", model, visitors.DIRTY, requests=args.requests
        )
        (args.folder / "partial").rename(log)
    rows = parquet.read_metadata(log).num_rows
    print(f"{rows:,} rows, {log.stat().st_size >> 20} MiB", flush=True)
    shutil.rmtree(made, ignore_errors=True)
    for path in (out, out.with_suffix(".md")):
        path.unlink(missing_ok=True)
    limits = ("--threads", "1", "--memory-mb", str(args.memory_mb))
    commands = {
        "import": ("import", str(log), "--out", str(made)),
        "triplets": ("triplets", str(made), "--out", str(out), "--largest-weight", str(PLACES)),
    }
    costs = [
        [name, *(f"{value:,.0f}" for value in measured(*arguments, *limits))]
        for name, arguments in commands.items()
    ]
    timing.print_table("Cost", ("command", "s", "s of CPU", "peak, MiB", "its own, MiB"), costs)
    found, truth = places_of(out.with_suffix(".md")), visitors.looking(model, PLACES)
    relevance = lists.click.mean(0) * (1 - model.shuffled) + lists.click.mean() * model.shuffled
    places = []
    for place in range(PLACES):
        ratio, weighed = found[place, 1] / truth[place], found[place, 3] / 100 / relevance[place]
        places.append(
            [
                str(place + 1),
                f"{truth[place]:.3f}",
                f"{found[place, 1]:.3f}",
                f"{ratio:.3f}",
                f"{weighed:.3f}",
            ]
        )
    header = ("place", "looked at", "estimated", "estimated / true", "weighted clicks / relevance")
    timing.print_table("Places", header, places)
    print(re.sub(r"(?s)\| place .*", "", out.with_suffix(".md").read_text()))
    print((made / "report.md").read_text())


if __name__ == "__main__":
    main()
