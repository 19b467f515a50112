"""Shares timing in rounds, a description of the machine and Markdown tables among benchmarks."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"


def run_rounds(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Returns the results of all contenders over several rounds.

    In each round every contender runs once, so that noise of the machine affects them alike.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            results[name].append(contender())
    return results


def median_text(values: Iterable[float], digits: int = 0) -> str:
    """Returns the median as text, or "not measured"."""
    values = list(values)
    return f"{statistics.median(values):,.{digits}f}" if values else NOT_MEASURED


def range_text(values: Iterable[float], digits: int = 0) -> str:
    """Returns "least to greatest"."""
    values = list(values)
    return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}" if values else NOT_MEASURED


def ratio_text(values: Sequence[float], base: Sequence[float], *, digits: int = 2) -> str:
    """Returns the median over rounds of value / base of the same round."""
    return median_text([value / other for value, other in zip(values, base, strict=True)], digits)


def missing_modules(*modules: str) -> str:
    """Returns why a row cannot be measured: "no grain", or "" where all modules are installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"no {', '.join(absent)}" if absent else ""


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a Markdown table.

    A row of two cells is one that was not measured: its name and the reason.
    """
    print(
        f"\n{title}\n\n| {' | '.join(header)} "
        f"|\n|{'|'.join(['---', *['---:'] * (len(header) - 1)])}|"
    )
    for row in rows:
        if len(row) < len(header):
            name, reason = row
            row = [name, f"{NOT_MEASURED} ({reason})", *[""] * (len(header) - 2)]
        print(f"| {' | '.join(row)} |", flush=True)


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_machine(rounds: int = 0) -> None:
    """Prints machine, versions and date in one line.

    Starts jax's devices: call it where that disturbs no measurement.
    """
    import jax

    devices = jax.devices()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{available_cores()} cores ({_cpu_model()}{load}), {len(devices)} x "
        f"{devices[0].device_kind}, jax {jax.__version__}, "
        f"Python {platform.python_version()}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        + (f"; medians of {rounds} rounds" if rounds else ""),
        flush=True,
    )
