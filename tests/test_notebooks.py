"""The notebooks: each .py source is paired with an executed .ipynb, and still runs.

``python tests/test_notebooks.py`` (``make notebook``) executes the sources again and stores what they show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook of ``source`` with the outputs of a fresh kernel."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "5000"}  # or threads spin while they wait for a busy core
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(FOLDER.parent)}}).execute(env=environment)
    return notebook


def store(source: Path) -> None:
    """Write the executed notebook beside ``source``; unchanged cells keep no trace of the run but their outputs."""
    notebook = executed(source)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(out.get("text", "") for cell in code(notebook) for out in cell.outputs)


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
class TestNotebook:
    def test_the_pair_says_the_same_and_was_executed_in_order(self, source: Path) -> None:
        pair = nbformat.read(str(source.with_suffix(".ipynb")), as_version=4)
        nbformat.validate(pair)
        ours = jupytext.read(source)
        assert [(c.cell_type, c.source) for c in pair.cells] == [(c.cell_type, c.source) for c in ours.cells]
        assert [c.execution_count for c in code(pair)] == list(range(1, len(code(pair)) + 1))
        assert not [o for c in code(pair) for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]

    def test_it_runs_and_still_proves_what_it_shows(self, source: Path) -> None:
        pair = nbformat.read(str(source.with_suffix(".ipynb")), as_version=4)
        now, stored = printed(executed(source)), printed(pair)
        assert now.count("equal bit for bit") == stored.count("equal bit for bit") > 0
        assert "NOT EQUAL" not in now
        assert "logits equal bit for bit: True" in now


if __name__ == "__main__":
    for each in [Path(name) for name in sys.argv[1:]] or SOURCES:
        store(each)
        print(each.with_suffix(".ipynb").relative_to(FOLDER.parent))
