"""Training under Lightning: the module, the schedule of a quantized run, and data that resumes to the batch."""

from qat.training.averaging import WeightAverage
from qat.training.build import allow_targets, build
from qat.training.callbacks import QuantizationSchedule
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableData, ResumableLoader
from qat.training.finetune import QuantizationAware, deploy, quantize
from qat.training.ladder import Ladder
from qat.training.module import QuantizedTraining, WarmupCosine
from qat.training.oscillation import Oscillations
from qat.training.pretrained import TokenDataModule, causal_lm
from qat.training.pruning import PruningSchedule
from qat.training.sharding import clip_grad_norm, gather, shard
from qat.training.text import LineDataModule, TextDataModule
from qat.training.tokens import BitsPerByte, TokenCrossEntropy

__all__ = [
    "BitsPerByte",
    "DigitsDataModule",
    "ImageDataModule",
    "Ladder",
    "LineDataModule",
    "Oscillations",
    "PruningSchedule",
    "QuantizationAware",
    "QuantizationSchedule",
    "QuantizedTraining",
    "ResumableData",
    "ResumableLoader",
    "TextDataModule",
    "TokenCrossEntropy",
    "TokenDataModule",
    "WarmupCosine",
    "WeightAverage",
    "allow_targets",
    "build",
    "causal_lm",
    "clip_grad_norm",
    "deploy",
    "gather",
    "quantize",
    "shard",
]
