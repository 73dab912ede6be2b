"""What a kernel is given and what it must return.

A kernel multiplies integers:

    acc[m, n] = sum_k  (x[m, k] - zero_point) * w[n, k]            exactly
    y[m, n]   = float32(acc[m, n]) * multiplier[n] + bias[n]       two roundings, no fused multiply-add

and the same for convolutions, whose padding has level 0; or, for two activations (attention),

    acc[..., m, n] = sum_k  (a[..., m, k] - zero_point_a) * (b[..., k, n] - zero_point_b)       exactly
    y[..., m, n]   = float32(acc[..., m, n]) * multiplier                                       one more rounding

Every backend returns the same accumulators, and the same ``y`` bit for bit; which one runs is only a question of speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qat.errors import OverflowBoundError
from qat.numerics.tensor import PackedTensor, QuantizedTensor


@dataclass
class Activation:
    """The left operand, or either one of a product of two activations.

    Attributes:
        values: int8 or uint8 integers, (rows, in) or (batch, in, *spatial); in a product of two, (..., m, k) or
            (..., k, n).
        zero_point: None (zero), an int, or an int32 tensor that broadcasts against ``values``; it does not vary along
            the dimension that is summed over.
        bound: no level ``values - zero_point`` is greater than this in magnitude.
    """

    values: Tensor
    zero_point: Tensor | int | None
    bound: int

    @classmethod
    def of(cls, x: QuantizedTensor) -> Activation:
        fmt = x.spec.fmt
        bound = fmt.level_bound if x.zero_point is None else fmt.hi - fmt.lo
        return cls(fmt.levels(x.codes), x.zero_point, bound)

    @property
    def fixed(self) -> bool:
        """Whether the zero point is known before the kernel runs."""
        return self.zero_point is None or isinstance(self.zero_point, int)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """The levels in a dtype that holds them exactly."""
        values = self.values.to(dtype)
        return values if self.zero_point is None else values - self.zero_point

    def shifted(self) -> tuple[Tensor, int]:
        """The values as uint8 with the zero point that goes with them (int8 values move up by 128)."""
        zero_point = int(self.zero_point or 0)
        if self.values.dtype == torch.uint8:
            return self.values, zero_point
        return self.values.view(torch.uint8) ^ 128, zero_point + 128


_handles = itertools.count()
LASTING: WeakValueDictionary[int, Weight] = WeakValueDictionary()
"""Weights that last, by handle: compiled graphs can carry an int, but not a weight with its packed copies."""


class Weight:
    """The right operand: levels (out, in) or (out, in // groups, *kernel), int8 (int16 for affine 8-bit weights).

    Attributes:
        bound: no level is greater than this in magnitude.
        lasting: the levels will be used again, so that packing them pays; such a weight is found again by its
            ``handle`` from compiled code, and remembers in ``chosen`` which backend ran.
        cache: what a backend derives from the levels (a packed copy, row sums); it lives as long as the codes do.
        narrow: whether 4 bits hold the levels, or every other integer between the least and the greatest.
        source: where there is one, the levels can be derived anew: they are held from the first use of ``levels`` until
            a backend that has packed them calls :meth:`release`, and :meth:`once` does not hold them at all.
    """

    def __init__(self, levels: Tensor, bound: int, lasting: bool = False) -> None:
        self._levels: Tensor | None = levels
        self.source: Callable[[], Tensor] | None = None
        self.bound, self.lasting = bound, lasting
        self.narrow = bound <= 7
        self.shape, self.dtype = levels.shape, levels.dtype
        self.cache: dict[Any, Any] = {}
        self.chosen: dict[Any, Any] = {}
        self.handle = -1
        if lasting:
            self.handle = next(_handles)
            LASTING[self.handle] = self

    @classmethod
    def of(cls, w: QuantizedTensor, lasting: bool = False) -> Weight:
        fmt = w.spec.fmt
        bound = fmt.level_bound if w.zero_point is None else fmt.hi - fmt.lo
        made = cls(w.levels(), bound, lasting)
        if isinstance(w, PackedTensor):
            made.source = w.levels
            made.release()
        made.narrow = made.narrow or (fmt.bits <= 4 and w.zero_point is None)
        return made

    @property
    def levels(self) -> Tensor:
        if self._levels is None:
            self._levels = self.once()
        return self._levels

    def once(self) -> Tensor:
        """The levels, for one look at them."""
        if self._levels is not None:
            return self._levels
        assert self.source is not None
        return self.source()

    def release(self) -> None:
        """Let go of levels that can be derived anew."""
        if self.source is not None:
            self._levels = None

    @property
    def inputs(self) -> int:
        """How many products one accumulator sums."""
        return self.shape[1:].numel() if self.shape[0] else 0

    def cached(self, key: Any, make: Any) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def row_sums(self) -> Tensor:
        """int32 (out,): what a zero point of 1 takes off each accumulator."""
        return self.cached("row_sums", lambda: self.once().flatten(1).sum(1, dtype=torch.int32))

    def accumulator_bound(self, x: Activation) -> int:
        """No accumulator, and no partial sum in any order, is greater than this in magnitude.

        First by the formats alone; where that is too coarse for float32, by the levels themselves.
        """
        coarse = self.inputs * self.bound * x.bound
        if coarse < 2**24:
            return coarse
        def row_bound() -> int:
            return int(self.once().flatten(1).to(torch.int32).abs().sum(1).max()) if self.shape.numel() else 0
        return self.cached("row_bound", row_bound) * x.bound


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation for each spatial dimension, and the number of groups, of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def dims(self) -> int:
        return len(self.stride)

    def output_size(self, size: torch.Size, kernel: torch.Size) -> tuple[int, ...]:
        """The spatial size of the output for inputs ``size`` = (batch, in, *spatial)."""
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in
                     zip(size[2:], kernel[2:], self.stride, self.padding, self.dilation))


def matmul_bound(a: Activation, b: Activation) -> int:
    """No accumulator of ``a @ b``, and no partial sum in any order, is greater than this in magnitude.

    First by the formats alone; where that is too coarse for float32, by the levels of ``a`` themselves (probabilities
    are 8-bit codes, but few of a row are large).
    """
    inputs = a.values.shape[-1]
    coarse = inputs * a.bound * b.bound
    if coarse < 2**24 or not a.values.numel():
        return coarse
    return int(a.levels(torch.int32).abs_().sum(-1, dtype=torch.int64).max()) * b.bound


def check_int32(bound: int, where: str) -> None:
    """Raise :class:`OverflowBoundError` if sums up to ``bound`` may not fit an int32 accumulator."""
    if bound >= 2**31:
        raise OverflowBoundError(f"{where}: sums up to {bound} do not fit an int32 accumulator")
