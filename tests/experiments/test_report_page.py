"""The table of a sweep's report in a real browser: it sorts by any column, and rows without a figure stay at its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import PROMPT

import gpt2onnx

pytestmark = pytest.mark.system

# Three tokens hold no four in a row, and two neither four nor three: their columns Repeated and Distinct-3 are empty.
SOME, NONE = [3, 40, 2, 12, 25, 2, 7], [2, 2, 2]
HEADINGS = {"Tokens/s": "tokens_per_second", "Tokens": "mean_length", "Log probability": "mean_logprob"} | {
    "Distinct-3": "distinct_3",
    "Repeated": "repeated_4gram_share",
}


def open_report(browser: Any, model: gpt2onnx.Model, lengths: list[int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The page of a sweep over texts of these lengths, and its rows by strategy in the grid's order."""
    grid = [{"name": f"number {number}", "max_new_tokens": length} for number, length in enumerate(lengths)]
    runs = gpt2onnx.sweep(model, PROMPT, grid=grid, out=folder, energy=False)
    page = browser.new_page()
    assert runs.report is not None
    page.goto(runs.report.as_uri())
    return page, {row["strategy"]: row for row in runs.rows()}


def shown(page: Any) -> list[str]:
    """The strategies from top to bottom."""
    return [text.strip() for text in page.locator(".all tbody th").all_text_contents()]


def heading_of(page: Any, text: str) -> Any:
    """A column's button by its text; to its name, the style adds an arrow once the column is sorted."""
    return page.locator(".all thead button").filter(has_text=re.compile(f"^{re.escape(text)}$"))


@pytest.mark.parametrize("lengths", [SOME, NONE], ids=["some figures", "no figures"])
def test_rows_without_a_figure_stay_last(
    lengths: list[int], browser: Any, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    page, rows = open_report(browser, tales_model, lengths, tmp_path / "sweep")
    missing = {name for name, row in rows.items() if row["distinct_3"] is None}
    assert len(missing) == lengths.count(2)
    for heading, figure in HEADINGS.items():
        button = heading_of(page, heading)
        for falling in (True, False):
            button.click()
            found = shown(page)
            assert sorted(found) == sorted(rows), heading
            values = [rows[name][figure] for name in found]
            known = [value for value in values if value is not None]
            assert known == sorted(known, reverse=falling), (heading, values)
            assert values[: len(known)] == known, f"{heading}: a row without a figure stands before one with a figure"
            rest = [name for name in rows if rows[name][figure] is None]
            assert found[len(known) :] == rest, "they keep the grid's order"
            order = page.locator(".all thead th[aria-sort]")
            assert order.count() == 1
            assert order.get_attribute("aria-sort") == ("descending" if falling else "ascending")
    strategies = heading_of(page, "Strategy")
    strategies.click()
    assert shown(page) == list(rows), "a click on the first heading restores the grid's order"
    strategies.click()
    assert shown(page) == list(rows)[::-1]
