"""The top floor: a whole run from float to deployed, its evaluation, and the command line."""

from qat.pipeline.command import command, evaluate, train
from qat.pipeline.config import run_config, stored_config
from qat.pipeline.run import Run

__all__ = ["Run", "command", "evaluate", "run_config", "stored_config", "train"]
