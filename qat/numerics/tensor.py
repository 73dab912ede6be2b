"""The quantized tensor: codes and what they mean, a dataclass, no tensor subclass; and digests of any tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.numerics import affine, packing
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


    def rows(self, rows: slice) -> QuantizedTensor:
        """Some rows of a weight, with their scales; without the carrier."""
        return QuantizedTensor(self._codes_of(rows), _along(self.scale, rows), _along(self.zero_point, rows), self.spec,
                               None, self.dtype)

    def _codes_of(self, rows: slice) -> Tensor:
        return self.codes[rows]


def _along(value: Any, rows: slice) -> Any:
    """The part of a scale or zero point that belongs to these rows; one for the whole tensor is that of each part."""
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


class PackedTensor(QuantizedTensor):
    """A weight whose codes are kept packed: each access to ``codes`` unpacks them anew.

    Args:
        packed: uint8, what :func:`qat.numerics.packing.pack` made of the codes.
        shape: of the codes.
    """

    def __init__(self, packed: Tensor, shape: tuple[int, ...], scale: Tensor, zero_point: Tensor | int | None,
                 spec: TensorSpec) -> None:
        self.packed, self._shape = packed, torch.Size(shape)
        self.scale, self.zero_point, self.spec = scale, zero_point, spec
        self.carrier, self.dtype = None, torch.float32

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        return packing.unpack(self.packed, self.spec.fmt, self._shape)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def unpacked(self) -> QuantizedTensor:
        """The same with its codes at hand."""
        return QuantizedTensor(self.codes, self.scale, self.zero_point, self.spec)

    def _codes_of(self, rows: slice) -> Tensor:
        """From a multiple of 8 on, the codes of rows begin in a byte of their own."""
        inputs, bits, fmt = self._shape[1:].numel(), self.spec.bits, self.spec.fmt
        start, stop, _ = rows.indices(self._shape[0])
        if start % 8:
            return self.codes[rows]
        first, last = start * inputs * bits // 8, packing.packed_size(stop * inputs, bits)
        return packing.unpack(self.packed[first:last], fmt, (stop - start, *self._shape[1:]))

    def looked_up(self, indices: Tensor) -> Tensor:
        """The codes of the rows ``indices``, which begin at whole bytes: (*indices.shape, *shape[1:])."""
        rows = F.embedding(indices, self.packed.view(self._shape[0], -1))
        return packing.unpack(rows.reshape(-1), self.spec.fmt, (*indices.shape, *self._shape[1:]))


class _Dequantize(torch.autograd.Function):
    """Codes to values; the gradient of the values is the gradient of the carrier."""

    @staticmethod
    def forward(ctx, carrier, tensor, dtype):
        return affine.dequantize(tensor.codes, tensor.scale, tensor.zero_point, tensor.spec).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.clone(), None, None  # what reaches a carrier may be changed in place


def add_to_digest(digest: Any, name: str, value: Tensor) -> None:
    """Let a ``hashlib`` digest take in a tensor with its name, dtype and shape."""
    digest.update(f"{name}:{value.dtype}{tuple(value.shape)}\n".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
