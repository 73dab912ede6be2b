"""Training under Lightning: the module, the schedule of a quantized run, and data that resumes to the batch."""

from qat.training.build import allow_targets, build
from qat.training.callbacks import QuantizationSchedule
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableLoader
from qat.training.module import QuantizedTraining, WarmupCosine
from qat.training.pruning import PruningSchedule

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "PruningSchedule",
    "QuantizationSchedule",
    "QuantizedTraining",
    "ResumableLoader",
    "WarmupCosine",
    "allow_targets",
    "build",
]
