"""Tables, and CSV without formulas."""

from __future__ import annotations

import csv
import io

import pytest

from llm_api_server.formats import as_csv, as_lines, as_table


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert as_table([["A", "LONG"], ["wide", "b"], ["", "c"]]) == "A     LONG\nwide  b\n      c"


def test_lines_omit_fields_without_a_value() -> None:
    assert as_lines({"a": 0, "none": None, "empty": [], "name": "x"}) == "a     0\nname  x"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_text_becomes_a_formula(text: str) -> None:
    _, row = csv.reader(io.StringIO(as_csv(["n", "text"], [{"n": 1, "text": text}]), newline=""))
    assert row == ["1", f"'{text}"]


def test_csv_is_read_back_unchanged() -> None:
    rows: list[dict[str, object]] = [
        {"a": 'quote " and, comma', "b": None, "c": -1.5},
        {"a": "line\nend", "b": "a=b", "c": 2},
    ]
    text = as_csv(["a", "b", "c"], rows)
    assert list(csv.DictReader(io.StringIO(text, newline=""))) == [
        {"a": 'quote " and, comma', "b": "", "c": "-1.5"},
        {"a": "line\nend", "b": "a=b", "c": "2"},
    ]
