"""From integers to integers, as runtimes with integer biases go: codes made of accumulators, and of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.kernels.ste import Grid, Sums
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor


def product(sums: Sums, scale: Tensor, zero_point: Tensor | int | None, grid: Grid) -> Tensor:
    """The codes of a product's result on a grid with one scale, see :func:`qat.numerics.affine.requantize`."""
    return affine.requantize(sums.values, sums.step / scale, None if sums.addend is None else sums.addend / scale,
                             zero_point, grid.spec, *_ends(scale, zero_point, grid))


def addition(a: QuantizedTensor, b: QuantizedTensor, scale: Tensor, zero_point: Tensor | int | None,
             grid: Grid) -> Tensor:
    """The codes of ``a + b`` on a grid with one scale, see :func:`qat.numerics.affine.requantize_sum`."""
    lo, hi = (int(end) for end in _ends(scale, zero_point, grid))
    return affine.requantize_sum([(t.codes, t.scale / scale, int(t.zero_point or 0), t.spec) for t in (a, b)],
                                 int(zero_point or 0), grid.spec, lo, hi)


def adds_codes(a: QuantizedTensor, b: QuantizedTensor, out: TensorSpec) -> bool:
    """Whether runtimes have a kernel for such a sum: one scale each, all 8 bits, or all of one narrower type."""
    kinds = {torch.uint8 if s.format == "int8" else s.fmt.dtype for s in (a.spec, b.spec, out)}
    return len(kinds) == 1 and all(t.spec.fmt.grid == "affine" and not t.scale.dim() for t in (a, b))


def _ends(scale: Tensor, zero_point: Tensor | int | None, grid: Grid) -> list[Any]:
    """The least and the greatest code that an absorbed activation function leaves: numbers, or tensors."""
    spec, fmt = grid.spec, grid.spec.fmt
    ends: list[Any] = [fmt.lo, fmt.hi]
    for i, end in enumerate((grid.floor, grid.ceiling)):
        if end is None or (i == 0 and not fmt.signed):      # an absorbed ReLU's zero is the lowest unsigned code
            continue
        ends[i] = affine.quantize(torch.tensor(end, device=scale.device), scale, zero_point, spec)
    if any(isinstance(end, Tensor) for end in ends):
        return [torch.as_tensor(end, dtype=torch.float32, device=scale.device) for end in ends]
    return ends
