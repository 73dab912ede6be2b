"""Measure a run again from what is on disk: ``python evaluate.py run=<folder>`` or ``deployed=<folder>``."""

from pathlib import Path

from qat.pipeline import command, evaluate

main = command(evaluate, Path(__file__).resolve().parent / "conf", "evaluate")

if __name__ == "__main__":
    main()
