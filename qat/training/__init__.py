"""Training under Lightning: the module, the schedule of a quantized run, and data that resumes to the batch."""

from qat.training.build import allow_targets, build
from qat.training.callbacks import QuantizationSchedule
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableLoader
from qat.training.ladder import Ladder
from qat.training.module import QuantizedTraining, WarmupCosine
from qat.training.oscillation import Oscillations

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "Ladder",
    "Oscillations",
    "QuantizationSchedule",
    "QuantizedTraining",
    "ResumableLoader",
    "WarmupCosine",
    "allow_targets",
    "build",
]
