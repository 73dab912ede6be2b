"""Measure a run again from what is on disk: ``python evaluate.py run=<folder>`` or ``deployed=<folder>``."""

import os
from pathlib import Path

# before torch starts its threads: waiting ones sleep, since spinning ones stall every other process on busy cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from qat.pipeline import command, evaluate

main = command(evaluate, Path(__file__).resolve().parent / "conf", "evaluate")

if __name__ == "__main__":
    main()
