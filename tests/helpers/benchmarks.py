"""Runs a benchmark script and reads the table that it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows(name: str, *options: str) -> dict[str, list[str]]:
    """Runs a script for one round; returns first cell -> other cells of every printed row."""
    return printed_by(name, "--rounds", "1", *options)


def printed_by(name: str, *options: str, **variables: str) -> dict[str, list[str]]:
    """Runs a script, checks its machine line and returns first cell -> other cells of every row."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first = done.stdout.splitlines()[0]
    assert re.search(r"^\d+ cores .*, jax \d+\..*, Python 3\..*, \d{4}-\d\d-\d\d .* UTC", first)
    cells = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    return {line[0]: line[1:] for line in cells}
