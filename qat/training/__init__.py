"""Training under Lightning: the module, the schedule of a quantized run, and data that resumes to the batch."""

from qat.training.averaging import WeightAverage
from qat.training.build import allow_targets, build
from qat.training.callbacks import QuantizationSchedule
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableLoader
from qat.training.finetune import QuantizationAware, deploy, quantize
from qat.training.module import QuantizedTraining, WarmupCosine
from qat.training.pruning import PruningSchedule
from qat.training.sharding import shard

__all__ = [
    "DigitsDataModule",
    "ImageDataModule",
    "PruningSchedule",
    "QuantizationAware",
    "QuantizationSchedule",
    "QuantizedTraining",
    "ResumableLoader",
    "WarmupCosine",
    "WeightAverage",
    "allow_targets",
    "build",
    "deploy",
    "quantize",
    "shard",
]
