"""The HTML page: self-contained, with differences coloured."""

import re

from helpers.finished_runs import FIRST, make_run

from sicot_jax.report.document import Table, render_html
from sicot_jax.report.page import write_report


def test_the_page_needs_no_other_file(tmp_path):
    write_report([make_run(tmp_path / "one", FIRST)], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]{0,10})""", page)
    assert sources
    assert all(source.startswith("data:image") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_differences_are_coloured_by_what_they_show(tmp_path):
    page = render_html(
        [
            Table(
                ["a", "b"],
                [
                    ["x", "+1.00 [+0.50, +2.00]"],
                    ["y", "-1.00 [-2.00, -0.50]"],
                    ["z", "~+1.00"],
                    ["-", "-"],
                ],
            )
        ],
        tmp_path,
        title="t",
    )
    assert re.findall(r"<td class=(up|down|uncertain)>(.)", page) == [
        ("up", "+"),
        ("down", "-"),
        ("uncertain", "~"),
    ]
