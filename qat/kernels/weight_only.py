"""Products of float activations with integer weights.

    y[m, n] = sum_k x[m, k] * level[n, k] * scale[n, group of k]  + bias[n]

Three ways, of which the number of rows, their dtype, the spec and the device choose, and nothing else: a prepared
layer and a deployed one compute the same, bit for bit, on an input of the same shape.

- **Up to 16 rows** (``FEW_ROWS``) on a CPU: sums of the weight's columns in float32 (:mod:`qat.kernels.columns`),

      y = sum_g scale[n, g] * (sum_{k in g} x[k] * code[n, k]  -  zero_point[n, g] * sum_{k in g} x[k])

  Activations keep their precision: float32 stays float32, and of narrower ones only the result is rounded.
- **Up to 16 rows of bfloat16** and symmetric int4 with bfloat16 scales (``scale_dtype: bfloat16``) for groups of 32 to
  256 inputs: torch's own kernel for such weights, which is three times as fast.
- **More rows**, and everywhere else: the weight is dequantized into the dtype of the activations, a block that stays in
  the cache at a time, and multiplied by torch.

A deployed layer keeps its codes packed, and for few rows once more by input; a prepared one arranges them anew in each
call. Training runs the same forward; its backward dequantizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from qat.kernels import table
from qat.kernels.columns import RUN, Columns
from qat.kernels.contract import LASTING, Weight
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import PackedTensor, QuantizedTensor

FEW_ROWS = 16
"""Rows up to which sums of columns are faster than dequantizing (measured at 4 bits and 4096 x 4096, one thread: 9.1
against 12.2 ms)."""

BLOCK = 1 << 20
"""Weights that are dequantized at a time."""


def product(x: Tensor, w: QuantizedTensor, bias: Tensor | None, kernel: Weight | None = None) -> Tensor:
    """``x @ w.T + bias`` of floats ``x`` (..., in) and codes ``w`` (out, in), in the dtype of ``x`` or of autocast.

    Args:
        kernel: the weight of a frozen layer, which keeps what is derived from it.

    Differentiable in ``x``, in ``w`` through its carrier, and in ``bias``.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w.carrier, bias)):
        return _Product.apply(x, w.carrier, bias, w, kernel)
    return _forward(x, w, bias, kernel)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ w.T + bias`` of floats ``x`` (..., in) and ``w`` (out, in), by rows.

    torch multiplies an input of more dimensions and unusual strides in one way or another, depending on whether the
    weight requires a gradient; the last bits differ, and those of a deployed layer never do.
    """
    if torch.compiler.is_compiling():       # rows are the compiler's matter, and exporters look for this operator
        return F.linear(x.contiguous(), w, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    return F.linear(rows, w, bias).reshape(*x.shape[:-1], w.shape[0])


def _forward(x: Tensor, w: QuantizedTensor, bias: Tensor | None, kernel: Weight | None) -> Tensor:
    if table.opaque():
        stored = w.packed if isinstance(w, PackedTensor) else w.codes
        zero_point = torch.tensor(w.zero_point) if isinstance(w.zero_point, int) else w.zero_point
        return torch.ops.qat.weight_only(x, stored, list(w.shape), w.scale, zero_point, w.spec.format,
                                         w.spec.granularity, w.spec.group_size, w.spec.scale_dtype, bias,
                                         -1 if kernel is None else kernel.handle)
    if torch.compiler.is_compiling():       # an exporter that wants operators of torch
        return F.linear(x, w.dequantize(x.dtype), bias)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        y = _few(rows, w, bias, kernel) if _is_few(rows, w) else _blockwise(rows, w, bias)
    # not a view: a caller may change the output in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _is_few(x: Tensor, w: QuantizedTensor) -> bool:
    return (0 < x.shape[0] <= FEW_ROWS and x.device.type == "cpu" and w.shape.numel() > 0
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and Columns.available())


def _few(x: Tensor, w: QuantizedTensor, bias: Tensor | None, kernel: Weight | None) -> Tensor:
    kind = FewInt4Rows if FewInt4Rows.serves(x, w) else FewRows
    few = kind(w) if kernel is None else kernel.cached(kind.__name__, lambda: kind(w))
    return few(x, bias)


class FewInt4Rows:
    """A symmetric int4 weight with bfloat16 scales for groups, arranged for torch's kernel for few rows of bfloat16."""

    @staticmethod
    def serves(x: Tensor, w: QuantizedTensor) -> bool:
        spec = w.spec
        return (x.dtype == torch.bfloat16 and spec.format == "int4" and w.zero_point is None
                and spec.group_size in (32, 64, 128, 256) and spec.scale_dtype == "bfloat16" and w.shape[0] % 16 == 0)

    def __init__(self, w: QuantizedTensor) -> None:
        assert w.spec.group_size is not None
        fields = w.codes.to(torch.int32).sub_(w.spec.fmt.lo)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 1)
        self.group_size = w.spec.group_size
        scale = w.scale.detach().t().to(torch.bfloat16)
        self.scale = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()     # the kernel adds an offset

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, out) of ``x`` (rows, in), bfloat16."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = product(x.detach().contiguous(), self.packed, self.group_size, self.scale)
        return y if bias is None else y + bias.to(y.dtype)


class FewRows:
    """A weight, arranged for few rows of floats. Scales are kept by group: (groups, out), or (out,), or ()."""

    def __init__(self, w: QuantizedTensor) -> None:
        spec = w.spec
        scale = w.scale * spec.fmt.unit if spec.fmt.unit != 1.0 else w.scale
        zero_point = w.zero_point
        self.grouped = spec.group_size is not None
        self.run = spec.group_size or RUN
        self.columns = Columns(spec.fmt.levels(w.codes))
        self.scale = scale.t().contiguous() if self.grouped else scale
        self.offset = zero_point.float() if isinstance(zero_point, Tensor) else float(zero_point or 0)
        if self.grouped and isinstance(self.offset, Tensor):
            self.offset = self.offset.t().contiguous()
        self.affine = zero_point is not None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, out) of ``x`` (rows, in), in the dtype of ``x``."""
        values = x.detach().float()
        totals: Tensor | None = None
        if self.affine:
            totals = (values.view(len(x), -1, self.run) if self.grouped else values).sum(-1, keepdim=True)

        def reduce(y: Tensor, part: slice) -> Tensor:
            if not self.grouped:
                y = y.sum(1)
            if totals is not None:
                y.sub_(totals * _part(self.offset, part))
            y.mul_(_part(self.scale, part))
            return y.sum(1) if self.grouped else y

        y = self.columns.sums(values, reduce, self.run)
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype)


def _part(value: Any, part: slice) -> Any:
    """What belongs to some outputs; one number is that of all."""
    return value[..., part] if isinstance(value, Tensor) and value.dim() else value


def _blockwise(x: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    x = x.detach().contiguous()
    out, inputs = w.shape
    size = max(8, BLOCK // max(1, inputs) // 8 * 8)
    if out <= size or x.device.type != "cpu":
        return linear(x, w.dequantize(x.dtype), bias)
    y = x.new_empty(len(x), out)
    for start in range(0, out, size):
        rows = slice(start, min(out, start + size))
        y[:, rows] = F.linear(x, w.rows(rows).dequantize(x.dtype), None if bias is None else bias[rows])
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_carrier, bias, w, kernel):
        # what the graph keeps is freed as soon as this node's backward has run
        ctx.packed = w if isinstance(w, PackedTensor) else None
        ctx.w = None if ctx.packed else QuantizedTensor(w.codes.new_empty(0), w.scale, w.zero_point, w.spec)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, None if ctx.packed else w.codes)
        ctx.dtype = x.dtype
        return _forward(x, w, bias, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, codes = ctx.saved_tensors
        g_x = g_w = g_bias = None
        if ctx.needs_input_grad[0]:
            w = ctx.packed or QuantizedTensor(codes, ctx.w.scale, ctx.w.zero_point, ctx.w.spec)
            g_x = g @ w.dequantize(ctx.dtype)
        flat = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[1]:
            g_w = flat.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            g_bias = flat.sum(0)
        return g_x, g_w, g_bias, None, None


@custom_op("qat::weight_only", mutates_args=())
def _weight_only(x: Tensor, stored: Tensor, shape: list[int], scale: Tensor, zero_point: Tensor | None, format: str,
                 granularity: str, group_size: int | None, scale_dtype: str, bias: Tensor | None,
                 handle: int) -> Tensor:
    """The opaque operator for compilers: codes as they are, or packed, of a weight of ``shape``."""
    spec = TensorSpec(format, granularity, group_size, scale_dtype=scale_dtype)
    if list(stored.shape) == shape:
        return _forward(x, QuantizedTensor(stored, scale, zero_point, spec), bias, LASTING.get(handle))
    return _forward(x, PackedTensor(stored, tuple(shape), scale, zero_point, spec), bias, LASTING.get(handle))


@_weight_only.register_fake
def _(x, stored, shape, scale, zero_point, format, granularity, group_size, scale_dtype, bias, handle):
    return x.new_empty((*x.shape[:-1], shape[0]))
