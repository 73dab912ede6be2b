"""Scale and zero point, quantize, dequantize. The only rounding in the package is in :func:`quantize`.

    codes = clamp(round_half_even(float32(x) / scale) + zero_point, lo, hi)          affine grids
    codes = clamp(floor(float32(x) / scale), lo, hi)                                 mid-rise grids (never zero)
    codes = +1 where x >= 0, else -1                                                 sign grid

It is a division, as ONNX defines it, never a multiplication by the reciprocal: the two differ on about 0.1 % of
the codes. ``x`` is cast to float32 first. Scales are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.numerics.formats import SCALE_DTYPES, Format, TensorSpec

TINY = torch.finfo(torch.float32).tiny
INT32_STEPS = 2.0**30
"""What an int32 bias may hold, with room for the sums that it is added to."""


def scale_shape(shape: torch.Size | tuple[int, ...], spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the scale of a tensor of shape ``shape``.

    Raises:
        SpecError: if a group size does not divide the input.

    >>> scale_shape((6, 8), TensorSpec("int4", "per_group", group_size=4))
    (6, 2)
    """
    if spec.granularity == "per_channel":
        return (shape[0],)
    if spec.granularity == "per_group":
        return (shape[0], math.prod(shape[1:]) // check_group(shape, spec))
    if spec.granularity == "per_token":
        return (*shape[:-1], 1) if shape else ()
    if spec.granularity == "per_column":
        return tuple(shape[-1:])
    if spec.granularity == "per_sample":
        return (shape[0], *(1 for _ in shape[1:]))
    return ()


def check_group(shape: torch.Size | tuple[int, ...], spec: TensorSpec) -> int:
    """The group size, if it divides the inputs of a weight of shape ``shape``; else :class:`SpecError`."""
    size, inputs = spec.group_size or 1, math.prod(shape[1:])
    if inputs % size:
        raise SpecError(f"group_size {size} does not divide the {inputs} inputs of a weight of shape {tuple(shape)}")
    return size


def blocks(x: Tensor, spec: TensorSpec) -> Tensor:
    """``x``, or for per_group scales ``x`` as (out, groups, group_size)."""
    if spec.granularity != "per_group":
        return x
    size = check_group(x.shape, spec)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]) // size, size)


def aligned(value: Tensor, x: Tensor, spec: TensorSpec) -> Tensor:
    """A scale or zero point, reshaped to broadcast against ``x = blocks(...)``."""
    if spec.granularity == "per_group":
        return value.unsqueeze(-1)
    if spec.granularity == "per_channel":
        return value.reshape(-1, *([1] * (x.dim() - 1)))
    return value


def rows(x: Tensor, spec: TensorSpec) -> Tensor:
    """``x`` as a matrix with one row for each scale: (scales, values that share it)."""
    count = math.prod(scale_shape(x.shape, spec))
    if spec.granularity == "per_column":
        return x.reshape(x.numel() // count if count else 0, count).t()
    return x.reshape(count, x.numel() // count if count else 0)


def reduce_range(x: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Least and greatest value for each scale, float32, in the shape of the scale. Without values: 0, 0."""
    shape = scale_shape(x.shape, spec)
    if x.numel() == 0:
        zero = torch.zeros(shape, dtype=torch.float32, device=x.device)
        return zero, zero.clone()
    # torch's aminmax along a dimension is eight times slower than amin and amax
    low, high = x.aminmax() if spec.granularity == "per_tensor" else (rows(x, spec).amin(-1), rows(x, spec).amax(-1))
    return low.float().reshape(shape), high.float().reshape(shape)


def choose_qparams(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for values between ``low`` and ``high``.

    The range is widened to hold 0, so that real zero is exactly representable; a range of zero width gets scale 1.
    A scale is always finite and positive.

    Returns:
        ``scale`` float32 in the shape of ``low``; ``zero_point`` int32 likewise, or None for symmetric specs.
    """
    fmt = spec.fmt
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    if spec.symmetric is not False:
        magnitude = torch.maximum(-low, high) if fmt.signed else high
        return round_scale(magnitude / fmt.span, spec), None
    steps = float(fmt.hi - fmt.lo)
    scale = round_scale(high / steps - low / steps, spec)
    zero_point = (fmt.lo - low / scale).round().clamp(fmt.lo, fmt.hi)
    return scale, zero_point.to(torch.int32)


def symmetric_scale(x: Tensor, spec: TensorSpec) -> Tensor:
    """The scale of :func:`choose_qparams` for one row of signed symmetric codes, in the fewest calls; float32, ()."""
    return round_scale(torch.linalg.vector_norm(x, torch.inf) / spec.fmt.span, spec)


def round_scale(scale: Tensor, spec: TensorSpec) -> Tensor:
    """``scale`` as the spec stores it: positive, finite, rounded to ``scale_dtype`` or up to a power of two; float32.

    Zero (a dead channel, a constant input) becomes 1; NaN stays NaN, so that a diverged weight shows in the loss.
    """
    scale = torch.where(scale == 0, 1.0, scale.float().clamp(TINY, torch.finfo(torch.float32).max))
    if spec.power_of_two:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    if spec.scale_dtype != "float32":
        dtype = SCALE_DTYPES[spec.scale_dtype]
        scale = scale.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype).float()
    return scale


def mean_magnitude(x: Tensor, spec: TensorSpec) -> Tensor:
    """``mean |x|`` for each scale: the scale of binary and of ternary (BitNet b1.58) tensors. Float32."""
    shape = scale_shape(x.shape, spec)
    if x.numel() == 0:
        return torch.ones(shape, device=x.device)
    return rows(x.float().abs(), spec).mean(-1).reshape(shape)


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, spec: TensorSpec,
            out: Tensor | None = None) -> Tensor:
    """The code each value would get if the grid had no ends: float32, in the shape of ``blocks(x, spec)``.

    Everything that quantizes goes through here: this is the one rounding.
    """
    x = blocks(x, spec)
    if spec.fmt.grid == "sign":
        return torch.where(x >= 0, 1.0, -1.0)
    ratio = torch.div(x.float(), aligned(scale, x, spec), out=out)
    if spec.fmt.grid == "midrise":
        return ratio.floor_()
    ratio.round_()
    if zero_point is None:
        return ratio
    return ratio.add_(zero_point if isinstance(zero_point, int) else aligned(zero_point, x, spec))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, spec: TensorSpec) -> Tensor:
    """The codes of ``x``: an integer tensor of ``spec.fmt.dtype`` in the shape (and memory format) of ``x``.

    Args:
        x: any floating dtype; cast to float32 before the division.
        scale: float32, positive, in the shape of :func:`scale_shape`.
        zero_point: None (zero), an int, or a tensor in the shape of ``scale``.
        spec: format and granularity.
    """
    fmt = spec.fmt
    if not _piecewise(x, spec):
        return rounded(x, scale, zero_point, spec).clamp_(fmt.lo, fmt.hi).to(fmt.dtype).reshape(x.shape)
    codes = torch.empty_like(x, dtype=fmt.dtype)
    for piece, target, step, offset, (free, _) in _pieces(x, codes, scale, zero_point, spec):
        target.copy_(rounded(piece, step, offset, spec, free).clamp_(fmt.lo, fmt.hi))
    return codes


def whole_steps(bias: Tensor, step: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """A bias as integer runtimes hold it: whole numbers of ``step = scale_x * scale_w``, and what stays outside.

    Outside, and 0 steps, is a bias that int32 cannot hold, and that of a channel without weights, whose step is any.

    Args:
        bias: (out,), float32. ``step``: (out,) or (). ``dead``: (out,), whether all weights are 0; None: nowhere.

    Returns:
        Steps and the rest, both (out,) float32.
    """
    steps = (bias / step).round_()
    within = steps.abs() < INT32_STEPS
    if dead is not None:
        within &= ~dead
    return torch.where(within, steps, 0.0), bias.masked_fill(within, 0.0)


def requantize(sums: Tensor, multiplier: Tensor, addend: Tensor | None, zero_point: Tensor | int | None,
               spec: TensorSpec, lo: Any, hi: Any) -> Tensor:
    """Codes straight from accumulators: ``clamp(round_half_even(sums * multiplier) + zero_point, lo, hi)``.

    It is what integer runtimes do between two layers: one multiplication by ``scale_x * scale_w / scale_out`` where a
    layer with a float result multiplies and then divides. The two differ in about one code of a hundred thousand.

    Args:
        sums: float32 of whole numbers, bias included. ``multiplier``, ``addend``: broadcast against it.
        lo, hi: the ends, both numbers or both tensors.
    """
    def codes_of(piece: Tensor) -> Tensor:
        free = piece * multiplier
        if addend is not None:
            free.add_(addend)
        free.round_()
        if zero_point is not None:
            free.add_(zero_point)
        return free.clamp_(lo, hi)

    if not _piecewise(sums, spec):
        return codes_of(sums).to(spec.fmt.dtype)
    codes = torch.empty_like(sums, dtype=spec.fmt.dtype)
    for target, piece in zip(pieces(codes), pieces(sums)):
        target.copy_(codes_of(piece))
    return codes


def requantize_sum(operands: Sequence[tuple[Tensor, Tensor, int, TensorSpec]], zero_point: int, spec: TensorSpec,
                   lo: int, hi: int) -> Tensor:
    """Codes of a sum of two straight from their codes, in the expression of integer runtimes.

    ``clamp(round_half_even(a * ratio_a + (b * ratio_b + fixed)), lo, hi)``, ``fixed = z - (ratio_a * z_a + ratio_b *
    z_b)``, where each multiplication is fused with its addition (float64 gives the same), and the zero point is inside
    the rounding. It is QLinearAdd of onnxruntime on processors with fused multiply-add.

    Args:
        operands: codes, scale / scale of the sum (0-d float32), zero point and spec of each; shapes broadcast.
        zero_point, spec, lo, hi: the sum's. int8 codes count as the unsigned bytes, 128 higher, that files hold.
    """
    (a, ratio_a, z_a), (b, ratio_b, z_b) = ((codes.double().add_(_shift(own)), ratio, float(point + _shift(own)))
                                            for codes, ratio, point, own in operands)
    shift = _shift(spec)
    fixed = (zero_point + shift) - (ratio_a.double() * z_a + (ratio_b * z_b).double()).float()
    right = b.mul_(ratio_b.double()).add_(fixed.double()).float()
    free = a.mul_(ratio_a.double()).add(right).float().round_()
    return free.clamp_(lo + shift, hi + shift).sub_(shift).to(spec.fmt.dtype)


def _shift(spec: TensorSpec) -> int:
    return 128 if spec.format == "int8" else 0


def quantize_to_bytes(x: Tensor, scale: Tensor, offset: Tensor, lo: int, hi: int) -> Tensor:
    """The same rounding in the fewest calls, for one scale: uint8 ``clamp(round(x / scale) + offset, lo, hi)``.

    Args:
        x: float32. ``offset``: the zero point, plus 128 for signed formats, as a float32 scalar tensor.
    """
    return torch.div(x, scale).round_().add_(offset).clamp_(lo, hi).to(torch.uint8)


def quantize_to_levels(x: Tensor, scale: Tensor, zero_point: float, spec: TensorSpec) -> Tensor:
    """The same rounding in the fewest calls, for one scale of an affine grid: levels in float32, zero point taken off.

    Args:
        x: float32.
    """
    codes = torch.div(x, scale).round_()
    if not zero_point:
        return codes.clamp_(spec.fmt.lo, spec.fmt.hi)
    return codes.add_(zero_point).clamp_(spec.fmt.lo, spec.fmt.hi).sub_(zero_point)


def quantize_marking(x: Tensor, scale: Tensor, zero_point: Tensor | int | None,
                     spec: TensorSpec, above_only: bool = False) -> tuple[Tensor, Tensor]:
    """The codes of ``x``, and a uint8 tensor of its shape: 1 for values inside the grid, 0 for those beyond its ends.

    Args:
        above_only: mark only those beyond the upper end.
    """
    fmt = spec.fmt
    if not _piecewise(x, spec):
        free = rounded(x, scale, zero_point, spec)
        codes = free.clamp(fmt.lo, fmt.hi)
        inside = free <= codes if above_only else free == codes
        return codes.to(fmt.dtype).reshape(x.shape), inside.view(torch.uint8).reshape(x.shape)
    codes, inside = torch.empty_like(x, dtype=fmt.dtype), torch.empty_like(x, dtype=torch.uint8)
    marks = pieces(inside)
    for (piece, target, step, offset, (free, bounded)), mark in zip(_pieces(x, codes, scale, zero_point, spec), marks):
        rounded(piece, step, offset, spec, free)
        target.copy_(torch.clamp(free, fmt.lo, fmt.hi, out=bounded))
        # in place and cast: half the time of a comparison that makes booleans
        mark.copy_(free.le_(bounded) if above_only else free.eq_(bounded))
    return codes, inside


PIECE = 1 << 17
"""Values in a thread's share of a piece: two float32 copies of them stay in a core's cache between the steps."""


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """``x`` cut along its first dimension, so that elementwise steps on one piece after another stay in the cache."""
    return x.split(max(1, PIECE * torch.get_num_threads() * x.shape[0] // x.numel()))


def _piecewise(x: Tensor, spec: TensorSpec) -> bool:
    """Whether to go through ``x`` in pieces: large dense tensors on a CPU, outside of a compiler.

    Not through a single row, whose scales may lie along the dimension that would be cut.
    """
    return (not torch.compiler.is_compiling() and x.numel() > 2 * PIECE and x.device.type == "cpu" and _dense(x)
            and spec.fmt.grid != "sign" and spec.granularity != "per_group" and x.dim() > 1 and x.shape[0] > 1)


def _dense(x: Tensor) -> bool:
    return (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
            or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)))


def _pieces(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | int | None, spec: TensorSpec):
    """Pieces of ``x`` along its first dimension, with their targets, qparams, and two float32 scratch tensors."""
    inputs = pieces(x)
    # every other scale has the first dimension of x in front
    along = spec.granularity not in ("per_tensor", "per_column")
    steps = _split_like(scale, inputs) if along else [scale] * len(inputs)
    offsets = (_split_like(zero_point, inputs) if along and isinstance(zero_point, Tensor)
               else [zero_point] * len(inputs))
    scratch = torch.empty(2, inputs[0].numel())
    for piece, target, step, offset in zip(inputs, pieces(codes), steps, offsets):
        shaped = [s[: piece.numel()].as_strided(piece.size(), piece.stride()) for s in scratch]
        yield piece, target, step, offset, shaped


def _split_like(value: Tensor, pieces: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value.split([p.shape[0] for p in pieces])


def levels(codes: Tensor, zero_point: Tensor | int | None, spec: TensorSpec,
           dtype: torch.dtype | None = None) -> Tensor:
    """Codes to the integers that enter the matrix product (zero point taken off).

    Args:
        dtype: a floating type to have them in (bfloat16 holds them exactly too); left out, int8 where they fit, else
            int16 (an affine 8-bit tensor reaches -255..255).
    """
    fmt: Format = spec.fmt
    if dtype is not None:
        values = blocks(fmt.levels(codes), spec).to(dtype)
        if isinstance(zero_point, Tensor):
            values = values.sub_(aligned(zero_point, values, spec))
        elif zero_point:
            values = values.sub_(zero_point)
        return values if values.shape == codes.shape else values.reshape(codes.shape)
    if zero_point is None or (isinstance(zero_point, int) and zero_point == 0):
        return fmt.levels(codes)
    wide = blocks(codes, spec).to(torch.int16)
    wide -= zero_point if isinstance(zero_point, int) else aligned(zero_point.to(torch.int16), wide, spec)
    return (wide.to(torch.int8) if fmt.hi - fmt.lo <= 127 else wide).reshape(codes.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | int | None, spec: TensorSpec) -> Tensor:
    """``float32(level) * (scale * unit)``: one rounding, the product's. Float32, in the shape of ``codes``."""
    values = blocks(levels(codes, zero_point, spec, torch.float32), spec)
    step = scale * spec.fmt.unit if spec.fmt.unit != 1.0 else scale
    values.mul_(aligned(step, values, spec))
    return values if values.shape == codes.shape else values.reshape(codes.shape)
