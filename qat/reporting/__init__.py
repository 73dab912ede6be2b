"""Results for people: the table on the terminal and as CSV, the HTML report, many runs side by side, memory plans."""

from qat.reporting.html import report
from qat.reporting.memory import read_devices, render_memory
from qat.reporting.runtimes import render_runtimes
from qat.reporting.sweep import Sweep, read_sweep
from qat.reporting.table import Results, Row, compare, read_csv

__all__ = ["Results", "Row", "Sweep", "compare", "read_csv", "read_devices", "read_sweep", "render_memory",
           "render_runtimes", "report"]
