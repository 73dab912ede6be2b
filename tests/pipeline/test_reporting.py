"""The table and the HTML report."""

import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from qat.errors import CheckpointError
from qat.reporting import Results, Row, compare, read_csv, report
from qat.reporting.html import _ticks, line_chart

RESULTS = Results(
    metric="accuracy",
    rows=[
        Row("float", 0.98, 1.0, 0.97, 80_000, 1.25),
        Row("control", 0.1 + 0.2, 0.99, 0.98, 80_000, 1.5),
        Row("ptq", 0.5, 0.6, 0.7, 90_000, 2.0),
        Row("qat", 0.97, 0.97, 1.0, 90_000, 1.0),
        Row("deployed", 0.97, 0.97, 1.0, 21_000, 0.5),
    ],
    bit_equal=True,
    greatest_difference=0.0,
    examples=360,
    batch_size=64,
)


def test_csv_round_trips_and_compares(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(RESULTS.csv())
    assert read_csv(path) == RESULTS
    assert compare(RESULTS, read_csv(path)) == []
    path.write_text(RESULTS.csv().replace("0.5,0.6", "0.5,0.61").replace("True", "False"))
    assert compare(RESULTS, read_csv(path))[0].startswith("PTQ:")
    assert len(compare(RESULTS, read_csv(path))) == 2
    path.write_text("model,score\nfloat,nonsense\n")
    with pytest.raises(CheckpointError, match="not a results table"):
        read_csv(path)
    with pytest.raises(CheckpointError, match="not a results table"):
        read_csv(tmp_path / "nowhere.csv")


def test_table_fits_eighty_columns():
    out = io.StringIO()
    Console(file=out, width=80).print(RESULTS.render())
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("float", "control", "PTQ", "QAT", "deployed", "98.00%", "21,000", "0.26x", "bit for bit"):
        assert word in text
    assert "…" not in text


def test_a_metric_where_lower_is_better(tmp_path):
    rows = [dataclasses.replace(row, score=row.score / 2, bytes=1_555_600) for row in RESULTS.rows]
    rows[2] = dataclasses.replace(rows[2], agreement_float=None, latency_ms=131.25)
    results = dataclasses.replace(
        RESULTS, metric="bits_per_byte", rows=rows, higher_is_better=False, proportion=False
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=80).print(results.render())
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "bits per byte: lower is better." in text
    assert "0.485" in text
    assert "48.50%" not in text
    (tmp_path / "results.csv").write_text(results.csv())
    assert read_csv(tmp_path / "results.csv") == results
    page = report("run", results, {}, {}, {}, "")
    assert "Bits per byte: lower is better." in page
    assert "lower is better" not in report("run", RESULTS, {}, {}, {}, "")


class Balanced(HTMLParser):
    """Checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_self_contained_and_escaped():
    page = report(
        "run <1>",
        RESULTS,
        {"layers": [{"name": "<b>", "quantized": True, "macs": 1234}], "total": 3},
        {"equal": True, "layers": [], "nested": {"a": 1.5, "b": [1, 2]}},
        {"val accuracy": {"float": [(0, 0.1), (10, 0.9), (20, float("nan"))], "qat": [(0, 0.5)]}, "empty": {}},
        "seed: 0\n",
    )
    Balanced().feed(re.sub(r"<!doctype html>", "", page))
    assert "run &lt;1&gt;" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 1
    assert not re.search(r"(src|href)=|https?://|<script|nan", page)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.913, 0.987), (5, 5), (-3e-7, 2e-6), (0, 12345), (0, 0)])
def test_ticks_are_round_and_enclose(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-9 * max(1, abs(high))


def test_a_chart_without_values_says_so():
    assert "no values" in line_chart({"a": [(0, float("inf"))]})
