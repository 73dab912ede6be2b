"""Train, quantize, prove and deploy: ``python train.py recipe=w4a4``; ``python train.py --help`` lists the options."""

from pathlib import Path

from qat.pipeline import command, train

main = command(train, Path(__file__).resolve().parent / "conf", "config")

if __name__ == "__main__":
    main()
