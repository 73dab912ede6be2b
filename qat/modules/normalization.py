"""Batch norm: ordinary in training, folded into the quantized convolution in front in eval.

Folding multiplies the *multiplier* by gamma / sigma (of either sign, or zero); the codes never change. So the
prepared model in eval and the deployed model compute one expression, and training costs no second convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qat.modules.base import QuantizedModule, adopt
from qat.numerics.tensor import QuantizedTensor


class QuantizedBatchNorm(nn.Module):
    """Mixin for ``nn.BatchNorm1d/2d/3d``: can be folded into the layer in front, and its statistics can be frozen.

    Attributes:
        statistics_frozen: running statistics are used, and do not move, although the model is in ``train()``.
    """

    statistics_frozen: bool
    running_mean: Any
    running_var: Any
    weight: Any
    bias: Any
    eps: float
    momentum: float | None
    reset_running_stats: Any
    _producer: list[QuantizedModule]

    @classmethod
    def swap(cls, module: nn.Module, producer: QuantizedModule | None) -> QuantizedBatchNorm:
        """Turn ``module`` into one that folds into ``producer`` (None: that is never folded), in place."""
        adopted: QuantizedBatchNorm = adopt(cls, module)
        adopted.statistics_frozen = False
        adopted._producer = [] if producer is None else [producer]
        if producer is not None:
            producer._batch_norm = [adopted]
        return adopted

    def train(self, mode: bool = True) -> QuantizedBatchNorm:
        super().train(mode and not self.statistics_frozen)
        return self

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """``gamma / sigma`` and ``beta - mean * gamma / sigma``, float32, one for each channel."""
        mean, var = self.running_mean.float(), self.running_var.float()
        gain = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            gain = self.weight.float() * gain
        offset = -mean * gain
        return gain, offset if self.bias is None else self.bias.float() + offset

    def normalize(self, x: Tensor) -> Tensor:
        """The float batch norm."""
        return super().forward(x)

    def forward(self, input: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        x: Any = input
        if not self._producer:
            return self.normalize(x)
        producer = self._producer[0]
        if producer.folds():
            return x
        y = self.normalize(x)
        return y if producer.output_quantizer is None else producer.quantize_output(y)


class Absorbed(nn.Module):
    """Mixin for an activation function that the quantizers behind it (or in front of it) have taken over."""

    def forward(self, input: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        return input


CLAMPS: dict[type[nn.Module], tuple[float | None, float | None]] = {nn.ReLU: (0.0, None), nn.ReLU6: (0.0, 6.0)}
"""Activation functions that are a clamp from zero up: an unsigned quantizer absorbs them."""


def clamp_of(module: nn.Module) -> tuple[float | None, float | None] | None:
    """``(floor, ceiling)`` if ``module`` clamps from zero up (ReLU, ReLU6, Hardtanh(0, c)); else None."""
    if isinstance(module, nn.Hardtanh) and type(module) in (nn.Hardtanh, nn.ReLU6):
        if module.min_val != 0 or module.max_val <= 0:
            return None
        return 0.0, None if math.isinf(module.max_val) else float(module.max_val)
    return CLAMPS.get(type(module))
