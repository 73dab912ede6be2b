"""The quantized tensor: codes and what they mean. A dataclass, no tensor subclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.numerics import affine
from qat.numerics.formats import TensorSpec


@dataclass
class QuantizedTensor:
    """Integer codes with their scale, zero point and spec.

    Attributes:
        codes: stored integers of ``spec.fmt.dtype``, in the shape of the tensor they stand for.
        scale: float32; shape by granularity, see :data:`qat.numerics.formats.GRANULARITIES`.
        zero_point: None means 0; else a python int, or an int32 tensor in the shape of ``scale``.
        spec: the spec that made them.
        carrier: in training, a float tensor of the same shape that owns no memory (all strides 0) and only carries
            the gradient with respect to the dequantized value back to whoever produced the codes. None otherwise.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | int | None
    spec: TensorSpec
    carrier: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def levels(self, dtype: torch.dtype | None = None) -> Tensor:
        """The integers that enter a matrix product, zero point taken off; by default in the least dtype that fits."""
        return affine.levels(self.codes, self.zero_point, self.spec, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``level * scale`` in float32, then in ``dtype``; the gradient goes to the carrier, if there is one."""
        dtype = dtype or self.dtype
        if self.carrier is None or not torch.is_grad_enabled():
            return affine.dequantize(self.codes, self.scale, self.zero_point, self.spec).to(dtype)
        return _Dequantize.apply(self.carrier, self, dtype)


class _Dequantize(torch.autograd.Function):
    """Codes to values; the gradient of the values is the gradient of the carrier."""

    @staticmethod
    def forward(ctx, carrier, tensor, dtype):
        return affine.dequantize(tensor.codes, tensor.scale, tensor.zero_point, tensor.spec).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.clone(), None, None  # what reaches a carrier may be changed in place
