"""Measure a run again from what is on disk: ``python evaluate.py run=<folder>`` or ``deployed=<folder>``.

``runtimes=[torch,onnxruntime,openvino]`` with either compares the deployed model in these runtimes.
``plan=<directory, config.json or count>`` says what a model needs in memory, ``sweep=<folder>`` shows many runs.
"""

import os
from pathlib import Path

# before torch starts its threads: waiting ones spin for some microseconds and then sleep, since long spinning stalls
# every other process on busy cores, and sleeping at once makes a training step up to twice as long
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from qat.pipeline import command, evaluate

main = command(evaluate, Path(__file__).resolve().parent / "conf", "evaluate")

if __name__ == "__main__":
    main()
