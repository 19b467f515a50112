"""Writes the report of finished runs: Markdown, one HTML page, and figures in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sicot_jax.common.files import write_text
from sicot_jax.report import sections, tables
from sicot_jax.report.document import Block, Heading, Paragraph, render_markdown
from sicot_jax.report.html_page import render_html
from sicot_jax.report.inputs import read_runs
from sicot_jax.report.runs import check_comparable
from sicot_jax.report.variant_groups import group_by_variant
from sicot_jax.report.variant_roles import choose_reference


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
