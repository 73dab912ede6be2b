"""Batch norm: ordinary in training, folded into the quantized convolution in front in eval.

Folding multiplies the *multiplier* by gamma / sigma (of either sign, or zero); the codes never change. So the
prepared model in eval and the deployed model compute one expression, and training costs no second convolution.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from qat.modules.base import QuantizedModule, adopt
from qat.numerics.tensor import QuantizedTensor


def several_processes() -> bool:
    """Whether this is one process of several (of an initialized ``torch.distributed`` group)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is summed likewise."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return _SumOverProcesses.apply(g.contiguous())


def _sum_over_processes(x: Tensor) -> Tensor:
    return _SumOverProcesses.apply(x)


class QuantizedBatchNorm(nn.Module):
    """Mixin for ``nn.BatchNorm1d/2d/3d``: can be folded into the layer in front, and its statistics can be frozen.

    Attributes:
        statistics_frozen: running statistics are used, and do not move, although the model is in ``train()``.
        synchronized: in training, normalize with the mean and the variance over the batches of all processes.
        unseen: names of the model's batch norms that had seen no data when the ranges behind them were found. Whichever
            is trained first says so; the list is the same one for all of them, and empty then.
    """

    statistics_frozen: bool
    synchronized: bool = False
    unseen: list[str]
    running_mean: Any
    running_var: Any
    weight: Any
    bias: Any
    eps: float
    momentum: float | None
    num_batches_tracked: Any
    reset_running_stats: Any
    _check_input_dim: Any
    _producer: list[QuantizedModule]

    @classmethod
    def swap(cls, module: nn.Module, producer: QuantizedModule | None) -> QuantizedBatchNorm:
        """Turn ``module`` into one that folds into ``producer`` (None: that is never folded), in place."""
        adopted: QuantizedBatchNorm = adopt(cls, module)
        adopted.statistics_frozen, adopted.unseen = False, []
        adopted._producer = [] if producer is None else [producer]
        if producer is not None:
            producer._batch_norm = [adopted]
        return adopted

    def train(self, mode: bool = True) -> QuantizedBatchNorm:
        super().train(mode and not self.statistics_frozen)
        return self

    @property
    def has_seen_data(self) -> bool:
        """Whether the running statistics, if there are any, have left their first values."""
        mean, var = self.running_mean, self.running_var
        return mean is None or bool(mean.any()) or bool((var != 1).any())

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
        if self.training and self.unseen:
            names = ", ".join(self.unseen)
            self.unseen.clear()
            warnings.warn(
                f"the ranges of this model were found with batch norms that had seen no data ({names}). Training "
                "changes these at once: values behind them leave their ranges, and gradients vanish. Train in floating "
                "point first, or let ranges follow the training: qat.set_observing(model, True)", stacklevel=2)
        if self.synchronized and self.training and several_processes():
            return self._normalize_together(x)
        return super().forward(x)

    def _normalize_together(self, x: Tensor) -> Tensor:
        """Batch norm over the batches of all processes, on any device; differentiable. All must call it alike.

        (``torch.nn.SyncBatchNorm`` takes the module's place, so that nothing would fold it, and wants a GPU.)
        """
        self._check_input_dim(x)
        over = [d for d in range(x.dim()) if d != 1]
        values = x.float()
        count = values.new_tensor(x.numel() // x.shape[1])
        sums = _sum_over_processes(torch.cat([values.sum(over), count.view(1)]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        centered = values - mean.view(shape)
        var = _sum_over_processes(centered.square().sum(over)) / count
        if self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        y = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.float().view(shape)
        if self.bias is not None:
            y = y + self.bias.float().view(shape)
        return y.to(x.dtype)

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
