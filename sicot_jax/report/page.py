"""Writes the report of finished runs: Markdown, one HTML page, and figures in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from sicot_jax.common.files import write_text
from sicot_jax.errors import InputError
from sicot_jax.report import sections, tables
from sicot_jax.report.document import Block, Heading, Paragraph, render_html, render_markdown
from sicot_jax.report.run_table import is_run_table, is_sweep_folder, read_run_table
from sicot_jax.report.runs import DIVERGED_FILE, FinishedRun, check_comparable, read_run_folder
from sicot_jax.report.variant_roles import choose_reference, group_by_variant


def read_runs(inputs: Sequence[Path], select: Sequence[str] = ()) -> list[FinishedRun]:
    """Reads all runs that a report is made of.

    Args:
      inputs: run folders, folders that hold run folders at any depth, and run tables (`*.parquet`).
      select: patterns of the names of a table's runs, see `read_run_table`.

    Returns:
      The runs, each named by its path below the folder that holds them all.

    Raises:
      InputError: an input that is no finished run, a run given twice, or `select` without a table.
    """
    if select and not any(map(is_run_table, inputs)):
        raise InputError("--select chooses runs of a run table; give one, such as runs.parquet")
    runs: list[FinishedRun] = []
    paths: list[Path] = []
    for path in inputs:
        if is_run_table(path):
            rows = read_run_table(path, select)
            runs += rows
            # As if the table were a folder of its name.
            paths += [path.with_suffix("") / run.name for run in rows]
        else:
            folders = find_run_folders(path)
            runs += map(read_run_folder, folders)
            paths += folders
    return rename_runs(runs, paths)


def find_run_folders(folder: Path) -> list[Path]:
    """Finds the finished runs in a folder.

    Args:
      folder: run folder, or a folder with run folders at any depth.

    Returns:
      Run folders in the order of their paths, without those whose training diverged; the folder
      itself where it holds none.
    """
    if (folder / "config.json").exists():
        return [folder]
    folders = sorted(path.parent for path in folder.rglob("config.json") if _is_run_config(path))
    return [path for path in folders if not (path / DIVERGED_FILE).exists()] or [folder]


def _is_run_config(path: Path) -> bool:
    """Whether a run wrote that config.json, not a conversion or an index below the same folder."""
    try:
        stored = json.loads(path.read_bytes())
    except ValueError:
        return True  # a damaged run, which reading it says in one line
    return isinstance(stored, dict) and "config" in stored


def rename_runs(runs: Sequence[FinishedRun], paths: Sequence[Path]) -> list[FinishedRun]:
    """Names runs by their paths below the folder that holds them all.

    Args:
      runs: runs to name.
      paths: path of each run.

    Returns:
      The runs with new names; those of a sweep begin with their variant.

    Raises:
      InputError: a run is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise InputError(f"{path} is given twice; name each run once")
    parent = Path(os.path.commonpath([path.parent for path in resolved]))
    while any(is_sweep_folder(path.relative_to(parent).parts[0]) for path in resolved):
        parent = parent.parent
    return [
        dataclasses.replace(run, name=path.relative_to(parent).as_posix())
        for run, path in zip(runs, resolved, strict=True)
    ]


def write_report(inputs: Sequence[Path], out: Path, *, select: Sequence[str] = ()) -> str:
    """Writes `report.md`, `report.html` and figures of runs that were tested on the same photos.

    Args:
      inputs: run folders, folders of them, and run tables (`*.parquet`).
      out: folder to write into, made where it is missing.
      select: patterns of the names of a table's runs, see `run_table.read_run_table`.

    Returns:
      The main table and the notes on it, as Markdown for a terminal.

    Raises:
      InputError: runs that are not finished or cannot be compared.
    """
    runs = read_runs(inputs, select)
    check_comparable(runs)
    out.mkdir(parents=True, exist_ok=True)
    variants = group_by_variant(runs)
    reference = choose_reference(variants)
    variants = [reference, *(variant for variant in variants if variant is not reference)]
    training = sections.training_notes(variants)
    accuracy: list[Block] = [
        tables.accuracy_table(variants, reference),
        *map(Paragraph, sections.accuracy_notes(variants, reference)),
    ]
    blocks: list[Block] = [
        Heading("Report", 1),
        *training,
        *accuracy,
        *sections.catalog_section(reference.first_run, out),
        *sections.paper_section(reference.first_run),
        *sections.encoder_section(variants, reference),
        *sections.added_text_section(variants, reference),
        *sections.changed_titles_section(variants, reference),
        *sections.learning_rate_section(variants, reference),
        *sections.post_hoc_section(variants, reference, out),
        *sections.curve_section(variants, reference, out),
        *sections.confusion_section(variants, reference),
        *sections.attention_section(variants, reference),
        Heading("Runs"),
        tables.runs_table(runs),
    ]
    return write_pages(blocks, out, title="Report", shown=[*training, *accuracy])


def write_pages(blocks: Sequence[Block], out: Path, *, title: str, shown: Sequence[Block]) -> str:
    """Writes `report.md` and `report.html`.

    Args:
      blocks: content of both pages.
      out: folder to write into, with the figures.
      title: title of the HTML page.
      shown: blocks for the terminal.

    Returns:
      `shown` as Markdown.
    """
    write_text(out / "report.md", render_markdown(blocks))
    write_text(out / "report.html", render_html(blocks, out, title=title))
    return "\n" + render_markdown(shown).rstrip()
