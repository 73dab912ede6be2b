"""The results table: float, control, PTQ, QAT and deployed, side by side."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qat.errors import CheckpointError

TITLES = {
    "float": "float",
    "control": "control",
    "ptq": "PTQ",
    "qat": "QAT",
    "deployed": "deployed",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the run, measured on the whole test set.

    Attributes:
        model: a key of ``TITLES``.
        score: the first metric of the run (accuracy in 0..1 by default; see ``Results.higher_is_better``).
        agreement_float: share of the predictions that equal the float model's; None where that was not measured.
        agreement_prepared: the same against the prepared model after training.
        bytes: size of the weights file.
        latency_ms: median time for one batch, in milliseconds; None for a model that is not in memory.
        divergence: mean KL divergence of its predictions from the float model's, in nats; None where not measured.
        decode_ms: median time of one token at batch 1 on a cache; None for a model that generates no text.
        resident: bytes that the model holds in memory after it has run; None for a model that is not in memory.
    """

    model: str
    score: float
    agreement_float: float | None
    agreement_prepared: float | None
    bytes: int
    latency_ms: float | None
    divergence: float | None = None
    decode_ms: float | None = None
    resident: int | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows, and how the deployed logits compare with the prepared ones on the whole test set.

    Attributes:
        metric: name of ``Row.score``.
        bit_equal: whether all deployed logits equal the prepared ones bit for bit; None: there was nothing to compare.
        greatest_difference: the largest absolute difference of a logit.
        examples: test examples.
        batch_size: examples in the batch that ``latency_ms`` was measured with.
        higher_is_better: of the score.
        proportion: whether the score is a share of 1, which is shown in percent.
        prepared: the model that the deployed one was made of.
        tokens: tokens in that batch, of a model that generates text; else None.
    """

    metric: str
    rows: Sequence[Row]
    bit_equal: bool | None
    greatest_difference: float | None
    examples: int
    batch_size: int
    higher_is_better: bool = True
    proportion: bool = True
    prepared: str = "qat"
    tokens: int | None = None

    def title(self) -> str:
        """The metric for people."""
        return self.metric.replace("_", " ")

    def parity(self) -> str:
        """The sentence under the table."""
        if self.bit_equal is None:
            return ""
        if self.bit_equal:
            return f"The deployed logits equal the prepared ones bit for bit on all {self.examples} test examples."
        return (
            f"The deployed logits DIFFER from the prepared ones, by up to {self.greatest_difference:.3g} "
            f"on {self.examples} test examples."
        )

    def timing(self) -> str:
        """What the times in the table are."""
        if self.tokens is None:
            return f"latency: median of one batch of {self.batch_size}, models alternating."
        return f"prefill, decode: tokens/s, {self.tokens} at once and one by one; medians, models alternating."

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows as text, for the terminal and the HTML report."""
        whole = next((row.bytes for row in self.rows if row.model == "float"), None)
        text = self.tokens is not None
        columns: dict[str, Callable[[Row], str]] = {
            "model": lambda row: TITLES[row.model],
            self.title(): lambda row: f"{row.score:.2%}" if self.proportion else f"{row.score:.5g}",
            "as float": lambda row: _shown(row.agreement_float, ".2%"),
        }
        if any(row.model == self.prepared for row in self.rows):
            columns[f"as {TITLES[self.prepared]}"] = lambda row: _shown(row.agreement_prepared, ".2%")
        if any(row.divergence is not None for row in self.rows):
            columns["KL"] = lambda row: _shown(row.divergence, ".4f")
        if text:
            columns |= {
                "disk": lambda row: f"{row.bytes / 1e6:,.4g} MB",
                "memory": lambda row: _shown(None if row.resident is None else row.resident / 1e6, ",.4g", " MB"),
                "prefill": lambda row: _rate(self.tokens, row.latency_ms),
                "decode": lambda row: _rate(1, row.decode_ms),
            }
        else:
            columns |= {
                "bytes": lambda row: f"{row.bytes:,}",
                "of float": lambda row: "" if whole is None else f"{row.bytes / whole:.2f}x",
                "latency": lambda row: _shown(row.latency_ms, ".2f", " ms"),
            }
        return list(columns), [[column(row) for column in columns.values()] for row in self.rows]

    def render(self) -> Table:
        """For ``rich.print``."""
        headers, rows = self.cells()
        caption = Text(
            ("control: float, with the same extra training. QAT: prepared. deployed: integers.\n"
             if self.prepared == "qat" else "PTQ: calibrated. deployed: integers.\n" if self.tokens is None else "") +
            f"{', '.join(h for h in self.cells()[0] if h.startswith('as '))}: share of equal predictions. "
            + ("bytes: the weights file.\n" if self.tokens is None else "disk: the weights files.\n")
            + ("KL: divergence from the float model's predictions, in nats.\n"
               if any(row.divergence is not None for row in self.rows) else "")
            + f"{self.timing()}\n"
            + ("" if self.higher_is_better else f"{self.title()}: lower is better.\n")
        )
        caption.append(self.parity(), style={True: "bold green", False: "bold red", None: ""}[self.bit_equal])
        table = Table(title=f"{self.examples} test examples", caption=caption, caption_justify="left", box=SIMPLE_HEAD,
                      pad_edge=self.tokens is None, collapse_padding=self.tokens is not None)
        for i, header in enumerate(headers):
            lines = textwrap.fill(header, 9, break_long_words=False)
            table.add_column(lines, justify="right" if i else "left", no_wrap=True)
        for row, cells in zip(self.rows, rows):
            table.add_row(*cells, style="bold" if row.model == "deployed" else "")
        return table

    def csv(self) -> str:
        """Full precision: `read_csv` gives back equal results."""
        fields = [field.name for field in dataclasses.fields(Row)]
        about = {k: v for k, v in dataclasses.asdict(self).items() if k != "rows"}
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*fields, *about])
        for row in self.rows:
            writer.writerow([*dataclasses.astuple(row), *about.values()])
        return out.getvalue()


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _rate(tokens: int | None, ms: float | None) -> str:
    return "" if tokens is None or ms is None else f"{tokens / ms * 1e3:,.0f}"


def read_csv(path: Path) -> Results:
    """What ``Results.csv`` wrote.

    Raises:
        CheckpointError: no such file, or not a results file.
    """

    def number(text: str) -> float | None:
        return float(text) if text else None

    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        rows = [
            Row(
                line["model"], float(line["score"]), number(line["agreement_float"]),
                number(line["agreement_prepared"]), int(line["bytes"]), number(line["latency_ms"]),
                number(line["divergence"]), number(line["decode_ms"]),
                int(line["resident"]) if line["resident"] else None,
            )
            for line in lines
        ]  # fmt: skip
        last = lines[-1]
        return Results(
            last["metric"], rows, {"True": True, "False": False, "": None}[last["bit_equal"]],
            number(last["greatest_difference"]), int(last["examples"]), int(last["batch_size"]),
            {"True": True, "False": False}[last["higher_is_better"]],
            {"True": True, "False": False}[last["proportion"]], last["prepared"],
            int(last["tokens"]) if last["tokens"] else None,
        )  # fmt: skip
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a results table: {error}") from error


def compare(measured: Results, stored: Results) -> list[str]:
    """Every figure that was measured now and differs from the stored table, as a sentence; latency is not compared."""
    before = {row.model: row for row in stored.rows}
    differences = []
    for row in measured.rows:
        old = before.get(row.model)
        if old is None:
            differences.append(f"{TITLES[row.model]} is not in the stored table.")
            continue
        for field in ("score", "agreement_float", "agreement_prepared", "bytes", "divergence"):
            now, then = getattr(row, field), getattr(old, field)
            close = None not in (now, then) and math.isclose(now, then, rel_tol=1e-4, abs_tol=1e-6)
            if field == "divergence" and close:
                continue        # a mean over all classes: its last digits depend on the number of threads
            if now is not None and now != then:
                name = measured.metric if field == "score" else field
                differences.append(f"{TITLES[row.model]}: {name} is {now}, the stored table says {then}.")
    if measured.bit_equal is not None and measured.bit_equal != stored.bit_equal:
        differences.append(f"bit_equal is {measured.bit_equal}, the stored table says {stored.bit_equal}.")
    return differences
