"""The tables of RESULTS.md and docs/results/ are what compare.py makes of the committed .csv."""

import pytest

import compare
from run.names import ROOT
from run.runs import read_runs


def tables(text):
    """[[{title: cell}, ...] of each Markdown table whose rows are methods over seeds]."""
    found, titles = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["method", "seeds"]:
            titles = cells
            found.append([])
        elif not line.startswith("|"):
            titles = None
        elif titles and "---" not in line:
            found[-1].append(dict(zip(titles, cells, strict=True)))
    return found


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("RESULTS.md", "methods"),
        ("docs/results/seven.md", "methods"),
        ("docs/results/clip-range.md", "eps"),
        ("docs/results/more.md", "more"),
    ],
)
def test_a_table_of_methods_over_seeds_is_that_of_its_csv(page, table):
    (found,) = tables((ROOT / page).read_text())
    (made,) = tables(compare.markdown(read_runs([ROOT / "docs" / f"{table}.csv"])))
    assert found == [{title: row[title] for title in found[0]} for row in made]
