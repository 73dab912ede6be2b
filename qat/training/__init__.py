"""Training under Lightning: the module, the schedule of a quantized run, and data that resumes to the batch."""

from qat.training.build import allow_targets, build
from qat.training.callbacks import QuantizationSchedule
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableData, ResumableLoader
from qat.training.module import QuantizedTraining, WarmupCosine
from qat.training.text import LineDataModule, TextDataModule
from qat.training.tokens import BitsPerByte, TokenCrossEntropy

__all__ = [
    "BitsPerByte",
    "DigitsDataModule",
    "ImageDataModule",
    "LineDataModule",
    "QuantizationSchedule",
    "QuantizedTraining",
    "ResumableData",
    "ResumableLoader",
    "TextDataModule",
    "TokenCrossEntropy",
    "WarmupCosine",
    "allow_targets",
    "build",
]
