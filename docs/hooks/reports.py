"""Makes the reports below docs/results from the run table when the documentation is built."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

RESULTS = Path(__file__).parents[1] / "results"

# folder below docs/results: runs of the table, and the config field of a curve
REPORTS: dict[str, tuple[list[str], str | None]] = {
    "grocery_small": (["grocery_small"], None),
    "grocery_150_epochs": (["grocery_150_epochs"], None),
    "fashion_small": (["fashion_small"], None),
    "generated_1k_over_informativeness": (
        ["generated_1k/6000_*_sharing_0.6667"],
        "data.generated.informativeness",
    ),
    "generated_1k_over_word_sharing": (
        ["generated_1k/6000_*_informativeness_1.0_*"],
        "data.generated.word_sharing",
    ),
    "generated_1k_20000_photos_informativeness_0.5": (["generated_1k/20000_*"], None),
    "generated_10k_30000_photos_informativeness_0.5": (
        ["generated_10k/30000_photos_informativeness_0.5"],
        None,
    ),
    "generated_10k_over_informativeness": (
        [
            f"generated_10k/30000_photos_informativeness_{value}"
            for value in ("0", "0.25", "0.5", "1")
        ],
        "data.generated.informativeness",
    ),
}

_built = tempfile.mkdtemp(prefix="sicot-reports-")


def write_reports(out: Path) -> None:
    """Writes all reports, each with its figures into a folder of its name.

    Args:
        out: folder for the folders of the reports.
    """
    from sicot_jax.report.curve import write_curve
    from sicot_jax.report.page import write_report

    table = [RESULTS / "runs.parquet"]
    for name, (select, field) in REPORTS.items():
        if field is None:
            write_report(table, out / name, select=select)
        else:
            write_curve(table, out / name, field=field, select=select)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the reports to the pages and files of the documentation.

    Args:
        files: files of the documentation.
        config: configuration of MkDocs.

    Returns:
        The files with the reports.
    """
    from mkdocs.structure.files import File

    folder = Path(_built)
    write_reports(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".png"):
            source = f"results/{path.relative_to(folder).as_posix()}"
            files.append(File.generated(config, source, abs_src_path=str(path)))
    return files


def on_post_build(**_: Any) -> None:
    """Removes the folder that the reports were made in."""
    shutil.rmtree(_built, ignore_errors=True)
