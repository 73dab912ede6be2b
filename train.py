"""Train, quantize, prove and deploy: ``python train.py recipe=w4a4``; ``python train.py --help`` lists the options."""

import os
from pathlib import Path

# before torch starts its threads: waiting ones spin for some microseconds and then sleep, since long spinning stalls
# every other process on busy cores, and sleeping at once makes a training step up to twice as long
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from qat.pipeline import command, train

main = command(train, Path(__file__).resolve().parent / "conf", "config")

if __name__ == "__main__":
    main()
