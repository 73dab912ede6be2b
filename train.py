"""Train, quantize, prove and deploy: ``python train.py recipe=w4a4``; ``python train.py --help`` lists the options."""

import os
from pathlib import Path

# before torch starts its threads: waiting ones sleep, since spinning ones stall every other process on busy cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from qat.pipeline import command, train

main = command(train, Path(__file__).resolve().parent / "conf", "config")

if __name__ == "__main__":
    main()
