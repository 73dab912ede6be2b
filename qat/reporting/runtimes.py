"""The table of runtimes for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qat.runtimes import RuntimeTable


def render_runtimes(table: RuntimeTable) -> Table:
    """For ``rich.print``: the figures, what they are, and which operators ran; deviations from the recipe in red."""
    headers, rows = table.cells()
    caption = Text("\n".join(table.legend()))
    for text, bad in table.findings():
        caption.append(f"\n{text}", style="bold red" if bad else "")
    shown = Table(title="One model, many runtimes", caption=caption, caption_justify="left", box=SIMPLE_HEAD,
                  pad_edge=False, padding=(0, 0))
    for i, header in enumerate(headers):
        shown.add_column(header.replace(" ", "\n"), justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        shown.add_row(*cells, style="bold" if cells[0] == "torch" else "")
    return shown
