"""Results for people: the table on the terminal and as CSV, the HTML report."""

from qat.reporting.html import report
from qat.reporting.table import Results, Row, compare, read_csv

__all__ = ["Results", "Row", "compare", "read_csv", "report"]
