"""The backends: different carriers for the same integers.

================  =========================================================================================
``reference``     int64 arithmetic in plain torch; slow, and what the others are held against
``onednn``        int8 kernels of oneDNN on x86 with VNNI; rescale and bias fused
``int_mm``        ``torch._int_mm``: one row on x86 (a matrix-vector kernel), all rows on CUDA; convolutions unfolded
``columns``       up to four rows on x86: sums of the columns of weights of up to 4 bits, read as they are packed
``float``         floating point that is exact: float32 while sums stay below 2**24, float64 beyond
================  =========================================================================================

A backend says what it supports; :mod:`qat.kernels.table` decides which one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.kernels.columns import RUN, Columns, added_up
from qat.kernels.contract import Activation, Geometry, Weight, check_int32, matmul_bound
from qat.numerics import affine
from qat.numerics.formats import TensorSpec

INT32_LIMIT = 2**31


class Backend:
    """One carrier of the integers. Subclasses give exact accumulators; rescaling is written once, here."""

    name = ""

    def supports_linear(self, x: Activation, w: Weight) -> bool:
        return True

    def supports_convolution(self, x: Activation, w: Weight, geometry: Geometry) -> bool:
        return True

    def supports_matmul(self, a: Activation, b: Activation) -> bool:
        return True

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        """(rows, out), exact integers in whatever dtype holds them."""
        raise NotImplementedError

    def matmul_accumulators(self, a: Activation, b: Activation) -> Tensor:
        """(..., m, n) of (..., m, k) and (..., k, n), exact integers in whatever dtype holds them; a new tensor."""
        raise NotImplementedError

    def convolution_accumulators(self, x: Activation, w: Weight, geometry: Geometry) -> Tensor:
        """(batch, out, *spatial), exact integers in whatever dtype holds them."""
        raise NotImplementedError

    def linear(self, x: Activation, w: Weight, multiplier: Tensor, bias: Tensor | None) -> Tensor:
        """``float32(acc) * multiplier + bias``: (rows, out) float32. ``multiplier``: (out,) or ()."""
        return rescale(self.linear_accumulators(x, w), multiplier, bias)

    def convolution(self, x: Activation, w: Weight, geometry: Geometry, multiplier: Tensor,
                    bias: Tensor | None) -> Tensor:
        """``float32(acc) * multiplier + bias``: (batch, out, *spatial) float32. ``multiplier``: (out,) or ()."""
        shape = (-1, *(1,) * geometry.dims)
        return rescale(self.convolution_accumulators(x, w, geometry),
                       multiplier.reshape(shape) if multiplier.dim() else multiplier,
                       None if bias is None else bias.reshape(shape))

    def matmul(self, a: Activation, b: Activation, multiplier: Tensor) -> Tensor:
        """``float32(acc) * multiplier``: (..., m, n) float32. ``multiplier`` broadcasts against that shape."""
        acc = self.matmul_accumulators(a, b)
        if multiplier.dim() < acc.dim():
            return rescale(acc, multiplier, None)
        return acc.float().mul_(multiplier)


def rescale(acc: Tensor, multiplier: Tensor, bias: Tensor | None, taken_off: Tensor | None = None) -> Tensor:
    """The one expression of the rescale: ``float32(acc - taken_off) * multiplier + bias``, each step rounded once.

    Args:
        taken_off: integers that broadcast against ``acc``: what a zero point adds to the accumulators.
    """
    if torch.compiler.is_compiling() or acc.device.type != "cpu" or acc.numel() <= 2 * affine.PIECE:
        y = (acc if taken_off is None else acc - taken_off).float() * multiplier
        return y if bias is None else y.add_(bias)
    y = torch.empty_like(acc, dtype=torch.float32)
    for target, piece in zip(affine.pieces(y), affine.pieces(acc)):
        target.copy_(piece if taken_off is None else piece.sub_(taken_off)).mul_(multiplier)
        if bias is not None:
            target.add_(bias)
    return y


class Reference(Backend):
    """int64 arithmetic; convolutions unfold the padded input into a view and contract it."""

    name = "reference"

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        return x.levels(torch.int64) @ w.levels.to(torch.int64).t()

    def matmul_accumulators(self, a: Activation, b: Activation) -> Tensor:
        return a.levels(torch.int64) @ b.levels(torch.int64)

    def convolution_accumulators(self, x: Activation, w: Weight, geometry: Geometry) -> Tensor:
        windows = unfold(x.levels(torch.int64), w.shape, geometry)
        groups, dims = geometry.groups, geometry.dims
        batch, channels = windows.shape[:2]
        windows = windows.reshape(batch, groups, channels // groups, *windows.shape[2:])
        out = w.shape[0]
        kernel = w.levels.to(torch.int64).reshape(groups, out // groups, *w.shape[1:])
        letters = "ijk"[:dims]
        taps = "uvw"[:dims]
        acc = torch.einsum(f"bgc{letters}{taps},goc{taps}->bgo{letters}", windows, kernel)
        return acc.reshape(batch, out, *acc.shape[3:])


def unfold(levels: Tensor, kernel: torch.Size, geometry: Geometry) -> Tensor:
    """A view of all windows: (batch, in, *spatial_out, *kernel); padding is level 0."""
    pads = [p for padding in reversed(geometry.padding) for p in (padding, padding)]
    windows = F.pad(levels, pads) if any(pads) else levels
    for i, (taps, stride, dilation) in enumerate(zip(kernel[2:], geometry.stride, geometry.dilation)):
        windows = windows.unfold(2 + i, (taps - 1) * dilation + 1, stride)[..., ::dilation]
    return windows


class OneDNN(Backend):
    """The int8 kernels of oneDNN: uint8 activations (int8 ones are shifted by 128), int8 weights packed once.

    Without VNNI, pairs of u8 x s8 products saturate at int16; the backend then does not offer itself. And it is not
    taken at its word: some shapes come out wrong (oneDNN 3 with AMX: one output column under a stride; windows that lie
    wholly in the padding read uninitialised memory), so each shape is tried once on random integers against
    :class:`FloatCarrier` before it is used, and left to another backend if a single accumulator differs.
    """

    name = "onednn"

    def __init__(self) -> None:
        self.verdicts: dict[tuple[object, ...], bool] = {}

    @staticmethod
    def available() -> bool:
        return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()

    def _fits(self, x: Activation, w: Weight) -> bool:
        return (x.values.device.type == "cpu" and self.available() and w.dtype == torch.int8 and x.fixed
                and x.values.numel() > 0 and w.shape.numel() > 0
                and w.inputs * w.bound * 255 < INT32_LIMIT and 255 * w.inputs < 2**24)

    def supports_linear(self, x: Activation, w: Weight) -> bool:
        if not self._fits(x, w):
            return False
        rows = 1 << (x.values.shape[0] - 1).bit_length()
        return self._tried((rows, *w.shape), x, w, None)

    def supports_convolution(self, x: Activation, w: Weight, geometry: Geometry) -> bool:
        within = all(p <= d * (k - 1) for p, d, k in zip(geometry.padding, geometry.dilation, w.shape[2:]))
        return self._fits(x, w) and within and self._tried((x.values.shape, w.shape, geometry), x, w, geometry)

    def supports_matmul(self, a: Activation, b: Activation) -> bool:
        return False  # packing pays for operands that last

    def _tried(self, shape: tuple[object, ...], x: Activation, w: Weight, geometry: Geometry | None) -> bool:
        key = (*shape, x.values.dtype, int(x.zero_point or 0), torch.get_num_threads())
        if key not in self.verdicts:
            self.verdicts[key] = self._agrees(x, w, geometry)
        return self.verdicts[key]

    def _agrees(self, x: Activation, w: Weight, geometry: Geometry | None) -> bool:
        generator = torch.Generator().manual_seed(0)
        limits = torch.iinfo(x.values.dtype)
        values = torch.randint(limits.min, limits.max + 1, x.values.shape, generator=generator).to(x.values.dtype)
        few = min(127, (2**24 - 1) // (255 * w.inputs))
        levels = torch.randint(-few, few + 1, w.shape, generator=generator).to(torch.int8)
        probe, weight = Activation(values, x.zero_point, 255), Weight(levels, few)
        one = torch.ones(())
        if geometry is None:
            return torch.equal(self.linear(probe, weight, one, None), FLOAT.linear(probe, weight, one, None))
        return torch.equal(self.convolution(probe, weight, geometry, one, None),
                           FLOAT.convolution(probe, weight, geometry, one, None))

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        """Carried out of the kernel in float32: exact below 2**24, else by the float carrier."""
        if w.accumulator_bound(x) >= 2**24:
            return FLOAT.linear_accumulators(x, w)
        return self.linear(x, w, torch.ones((), dtype=torch.float32), None)

    def linear(self, x: Activation, w: Weight, multiplier: Tensor, bias: Tensor | None) -> Tensor:
        values, zero_point = x.shifted()
        out = w.shape[0]
        packed = w.cached("onednn", lambda: torch.ops.onednn.qlinear_prepack(w.once().contiguous(), None))
        w.release()
        return torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero_point, packed, multiplier.expand(out).contiguous(), _zeros(w, out, torch.int64),
            None if bias is None else bias.contiguous(), 1.0, 0, torch.float32, "none", [], "")

    def convolution_accumulators(self, x: Activation, w: Weight, geometry: Geometry) -> Tensor:
        if w.accumulator_bound(x) >= 2**24:
            return FLOAT.convolution_accumulators(x, w, geometry)
        return self.convolution(x, w, geometry, torch.ones(()), None)

    def convolution(self, x: Activation, w: Weight, geometry: Geometry, multiplier: Tensor,
                    bias: Tensor | None) -> Tensor:
        return self.convolution_requantized(x, w, geometry, multiplier, bias, 1.0, 0, torch.float32)

    def convolution_requantized(self, x: Activation, w: Weight, geometry: Geometry, multiplier: Tensor,
                                bias: Tensor | None, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        """The convolution with its result in float32, or in codes of an output scale that is a power of two.

        A power of two makes oneDNN's multiplication by the reciprocal the division of the one rounding.
        """
        values, x_zero_point = x.shifted()
        plain = values.is_contiguous()
        memory_format = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}[geometry.dims]
        values = values.contiguous(memory_format=memory_format)
        out = w.shape[0]
        stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
        packed = w.cached(("onednn", geometry, x_zero_point, values.shape), lambda: torch.ops.onednn.qconv_prepack(
            w.levels.contiguous(), _ones(w, out), 1.0, x_zero_point, stride, padding, dilation, geometry.groups,
            list(values.shape)))
        y = torch.ops.onednn.qconv_pointwise(
            values, 1.0, x_zero_point, packed, multiplier.expand(out).contiguous(), _zeros(w, out, torch.int32),
            None if bias is None else bias.contiguous(), stride, padding, dilation, geometry.groups, scale, zero_point,
            dtype, "none", [], "")
        return y.contiguous() if plain else y


def _ones(w: Weight, out: int) -> Tensor:
    return w.cached("ones", lambda: torch.ones(out))


def _zeros(w: Weight, out: int, dtype: torch.dtype) -> Tensor:
    return w.cached(("zeros", dtype), lambda: torch.zeros(out, dtype=dtype))


class IntMM(Backend):
    """``torch._int_mm``: int8 (on CPUs uint8 too) x int8 to int32.

    One uint8 row on a CPU runs a matrix-vector kernel. CUDA wants more than 16 rows and multiples of 8: zeros are
    padded on. Convolutions unfold their input; a zero point is then subtracted inside the windows, so that padding
    keeps level 0.
    """

    name = "int_mm"

    @staticmethod
    def available(device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and OneDNN.available())

    def supports_linear(self, x: Activation, w: Weight) -> bool:
        # torch 2.13 computes wrong products on CPUs when there is one input and more than one output
        return (self.available(x.values.device) and w.dtype == torch.int8 and w.inputs > 1
                and w.inputs * w.bound * 255 < INT32_LIMIT)

    def supports_convolution(self, x: Activation, w: Weight, geometry: Geometry) -> bool:
        padded = any(geometry.padding)
        return self.supports_linear(x, w) and x.fixed and (not padded or not x.zero_point or x.bound <= 127)

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        acc, taken_off = self._raw(x, w)
        return acc if taken_off is None else acc.sub_(taken_off)

    def linear(self, x: Activation, w: Weight, multiplier: Tensor, bias: Tensor | None) -> Tensor:
        acc, taken_off = self._raw(x, w)
        if taken_off is None or taken_off.dim() == 1:
            return rescale(acc, multiplier, bias, taken_off)
        return rescale(acc.sub_(taken_off), multiplier, bias)

    def _raw(self, x: Activation, w: Weight) -> tuple[Tensor, Tensor | None]:
        """The product of the values as they are, and what their zero point adds to it: (out,) or (rows, out)."""
        values, zero_point = x.values, x.zero_point
        one_row = values.device.type == "cpu" and values.shape[0] == 1 and x.fixed
        if one_row or (values.dtype == torch.uint8 and values.device.type == "cpu" and x.fixed):
            values, zero_point = x.shifted()
        elif values.dtype == torch.uint8:
            values, zero_point = (values ^ 128).view(torch.int8), (0 if zero_point is None else zero_point) - 128
        acc = self._matmul(values, w)
        if zero_point is None or (isinstance(zero_point, int) and zero_point == 0):
            return acc, None
        if isinstance(zero_point, int):
            return acc, w.cached(("zero", zero_point), lambda: w.row_sums() * zero_point)
        return acc, zero_point * w.row_sums()

    def _matmul(self, values: Tensor, w: Weight) -> Tensor:
        (rows, inputs), out = values.shape, w.shape[0]
        flat = w.levels.flatten(1)
        if values.numel() == 0 or flat.numel() == 0:
            return torch.zeros(rows, out, dtype=torch.int32, device=values.device)
        if values.device.type != "cuda":
            return torch._int_mm(_matrix(values), _matrix(flat).t())
        more_rows, more_in, more_out = _cuda_padding(rows, inputs, out)
        if more_rows or more_in:
            values = F.pad(values, (0, more_in, 0, more_rows))
        if more_out or more_in:
            flat = w.cached("padded", lambda: F.pad(flat, (0, more_in, 0, more_out)))
        return torch._int_mm(values, flat.t())[:rows, :out]

    def supports_matmul(self, a: Activation, b: Activation) -> bool:
        inputs = a.values.shape[-1]
        return self.available(a.values.device) and inputs > 1 and inputs * 255 * 255 < INT32_LIMIT

    def matmul_accumulators(self, a: Activation, b: Activation) -> Tensor:
        """One product of matrices at a time: there is no batched one. Zero points are corrected for afterwards.

        sum (a - za) (b - zb) = sum a b  -  zb * sum a  -  za * (sum b - inputs * zb)
        """
        cuda = a.values.device.type == "cuda"
        left, za = _as_int8(a) if cuda else (a.values, a.zero_point)
        right, zb = _as_int8(b)
        acc = self._batched(left, right)
        if _present(zb):
            acc -= zb * left.sum(-1, keepdim=True, dtype=torch.int32)
        if _present(za):
            taken_off = right.sum(-2, keepdim=True, dtype=torch.int32)
            acc -= za * (taken_off - zb * right.shape[-2] if _present(zb) else taken_off)
        return acc

    @staticmethod
    def _batched(left: Tensor, right: Tensor) -> Tensor:
        """int32 (..., m, n) of integers (..., m, k) and int8 (..., k, n)."""
        (m, k), n = left.shape[-2:], right.shape[-1]
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        shape = (*batch, m, n)
        if right.dim() == 2:                # one matrix for all: their rows are rows of one product
            m, batch = batch.numel() * m, torch.Size()
        count = batch.numel()
        left = left.reshape(m, k) if right.dim() == 2 else left.expand(*batch, m, k)
        left, right = left.reshape(count, m, k), right.expand(*batch, k, n).reshape(count, k, n)
        acc = torch.zeros(count, m, n, dtype=torch.int32, device=left.device)
        if left.device.type == "cuda" and acc.numel():
            more_m, more_k, more_n = _cuda_padding(m, k, n)
            left = F.pad(left, (0, more_k, 0, more_m))
            right = F.pad(right.transpose(1, 2), (0, more_k, 0, more_n)).transpose(1, 2)  # columns side by side
            acc = torch.stack([torch._int_mm(x, y)[:m, :n] for x, y in zip(left, right)])
        elif acc.numel():
            left, right = _packed(left), _matrix(right)
            for x, y, out in zip(left, right, acc):
                torch._int_mm(x, y, out=out)
        return acc.reshape(shape)

    def convolution_accumulators(self, x: Activation, w: Weight, geometry: Geometry) -> Tensor:
        if any(geometry.padding) and x.zero_point:
            x = Activation(x.levels(torch.int16).to(torch.int8), None, x.bound)
        windows = unfold(x.values, w.shape, geometry)
        batch, channels = windows.shape[:2]
        dims, groups, out = geometry.dims, geometry.groups, w.shape[0]
        spatial = windows.shape[2 : 2 + dims]
        order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        windows = windows.permute(order)
        results = []
        for g in range(groups):
            part = windows.narrow(1 + dims, g * (channels // groups), channels // groups)
            matrix = part.reshape(batch * spatial.numel(), w.inputs)
            rows = slice(g * (out // groups), (g + 1) * (out // groups))
            block = w.cached(("group", g), lambda rows=rows: Weight(w.levels[rows].flatten(1), w.bound))
            results.append(self.linear_accumulators(Activation(matrix, x.zero_point, x.bound), block))
        acc = torch.cat(results, 1) if groups > 1 else results[0]
        return acc.reshape(batch, *spatial, out).movedim(-1, 1)


def _packed(x: Tensor) -> Tensor:
    """``x`` contiguous, and with the strides of such a tensor along dimensions of one element too."""
    return x.contiguous().view(-1).view(x.shape)


def _matrix(x: Tensor) -> Tensor:
    """Matrices (..., m, n) whose rows, or whose columns, lie side by side.

    On CPUs ``torch._int_mm`` reads other strides wrongly: those of expanded tensors and of every n-th value, and even
    the one that means nothing, along a dimension of one element.
    """
    return x if x.transpose(-1, -2).is_contiguous() and not x.is_contiguous() else _packed(x)


def _cuda_padding(rows: int, inputs: int, out: int) -> tuple[int, int, int]:
    """What CUDA's kernel needs more of each: more than 16 rows, multiples of 8 of the rest."""
    return max(0, 17 - rows), -inputs % 8, -out % 8


def _as_int8(x: Activation) -> tuple[Tensor, Tensor | int | None]:
    """The values as int8, with the zero point that goes with them (uint8 values move down by 128)."""
    if x.values.dtype == torch.int8:
        return x.values, x.zero_point
    return (x.values ^ 128).view(torch.int8), (0 if x.zero_point is None else x.zero_point) - 128


def _present(zero_point: Tensor | int | None) -> TypeGuard[Tensor | int]:
    return isinstance(zero_point, Tensor) or bool(zero_point)


class ColumnSums(Backend):
    """Sums of the columns of narrow weights (:class:`~qat.kernels.columns.Columns`), exact in float32."""

    name = "columns"

    def supports_linear(self, x: Activation, w: Weight) -> bool:
        return self.supports_runs(RUN, x, w)

    @staticmethod
    def supports_runs(run: int, x: Activation, w: Weight) -> bool:
        """Whether sums over ``run`` inputs are exact, the least level of the weight being taken off on the way."""
        return (Columns.available() and x.values.device.type == "cpu" and w.dtype == torch.int8 and w.narrow
                and x.values.numel() > 0 and w.shape.numel() > 0 and run * x.bound * 3 * w.bound < 2**24)

    def supports_convolution(self, x: Activation, w: Weight, geometry: Geometry) -> bool:
        return False

    def supports_matmul(self, a: Activation, b: Activation) -> bool:
        return False

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        return self.of_levels(x.levels(torch.float32), x.bound, w)

    @staticmethod
    def columns(w: Weight) -> Columns:
        """The weight by input; it is kept, and the levels are let go."""
        columns = w.cached("columns", lambda: Columns(w.once()))
        w.release()
        return columns

    def of_levels(self, levels: Tensor, bound: int, w: Weight) -> Tensor:
        """The accumulators of levels in float32; float64 where their sum may reach 2**24."""
        dtype = torch.float32 if w.inputs * bound * w.bound < 2**24 else torch.float64
        return self.columns(w).sums(levels, lambda sums, part: sums.sum(1, dtype=dtype))

    def grouped(self, levels: Tensor, w: Weight, multiplier: Tensor, size: int) -> Tensor:
        """The accumulators of each group of ``size`` inputs times ``multiplier`` (groups, out), added up in float32."""
        return self.columns(w).sums(levels, lambda sums, part: added_up(sums.mul_(multiplier[:, part])), size)


class FewCalls:
    """A few float32 rows through a linear layer whose ranges and weight stand still, on a CPU, in the fewest calls.

    The expressions are those of quantize, :class:`IntMM` and :func:`rescale`; what does not change is computed once.
    At few rows the calls themselves are what costs: one row takes a third of the time of going through all floors.

    Args:
        spec: of the codes: affine.
        w: the weight.
        multiplier_w: what one level of the weight is worth, (out,) or ().
        bias: (out,) or None. ``steps``: (out,) float32 of whole numbers that are added to the accumulators, or None.
        scale, zero_point: of the codes; no scale: that of the row itself (symmetric; one row only).
    """

    def __init__(self, spec: TensorSpec, w: Weight, multiplier_w: Tensor, bias: Tensor | None,
                 scale: Tensor | None, zero_point: int = 0, steps: Tensor | None = None) -> None:
        fmt = spec.fmt
        shift = 128 if fmt.signed else 0
        self.spec, self.scale, self.offset = spec, scale, torch.tensor(float(zero_point + shift))
        self.lo, self.hi = fmt.lo + shift, fmt.hi + shift
        self.columns = _matrix(w.levels).t()
        self.taken_off = w.row_sums() * (zero_point + shift) if zero_point + shift else None
        if steps is not None:
            self.taken_off = (0 if self.taken_off is None else self.taken_off) - steps.to(torch.int32)
        self.multiplier = multiplier_w if scale is None else scale * multiplier_w
        self.bias = bias

    @staticmethod
    def serves(values: Tensor, spec: TensorSpec, zero_point: Tensor | int | None, w: Weight) -> bool:
        """Whether there is such a way for codes ``values``: one zero point, an affine grid, an integer kernel."""
        return (values.device.type == "cpu" and spec.fmt.grid == "affine" and not isinstance(zero_point, Tensor)
                and INT_MM.supports_linear(Activation(values, zero_point, 255), w))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` (rows, in), or (..., in) with one row in all; float32 (..., out)."""
        rows = x.contiguous() if x.dim() == 2 else x.view(1, -1)    # the strides of codes follow those of values
        scale = affine.symmetric_scale(rows, self.spec) if self.scale is None else self.scale
        y = self.product(affine.quantize_to_bytes(rows, scale, self.offset, self.lo, self.hi), scale)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def of_codes(self, codes: Tensor) -> Tensor:
        """The same from codes (rows, in) of the fixed scale."""
        codes = _matrix(codes)
        return self.product(codes.view(torch.uint8) ^ 128 if self.spec.fmt.signed else codes, self.scale)

    def product(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """The same from codes as bytes: signed ones moved up by 128."""
        acc = torch._int_mm(values, self.columns)
        if self.taken_off is not None:
            acc.sub_(self.taken_off)
        y = acc.mul(self.multiplier)
        if self.scale is None:
            assert scale is not None
            y.mul_(scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y


class FewNarrowCalls(FewCalls):
    """The same for weights of up to 4 bits with a scale for each group: on :class:`ColumnSums`.

    Args:
        multiplier_w: (out, groups).
        group_size: the inputs that share a scale.
    """

    def __init__(self, spec: TensorSpec, w: Weight, multiplier_w: Tensor, bias: Tensor | None, scale: Tensor | None,
                 zero_point: int, group_size: int) -> None:
        self.spec, self.scale, self.bias, self.weight = spec, scale, bias, w
        self.zero_point, self.group_size = float(zero_point), group_size
        self.multiplier = multiplier_w.t().contiguous()

    @staticmethod
    def serves(values: Tensor, spec: TensorSpec, zero_point: Tensor | int | None, w: Weight,
               run: int = RUN) -> bool:
        """Whether there is such a way; ``run``: the inputs that share a scale."""
        return (spec.fmt.grid == "affine" and not isinstance(zero_point, Tensor)
                and COLUMNS.supports_runs(run, Activation(values, zero_point, 255), w))

    def __call__(self, x: Tensor) -> Tensor:
        row = x.view(1, -1)
        scale = affine.symmetric_scale(row, self.spec) if self.scale is None else self.scale
        levels = affine.quantize_to_levels(row, scale, self.zero_point, self.spec)
        y = COLUMNS.grouped(levels, self.weight, self.multiplier, self.group_size).mul_(scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


class FloatCarrier(Backend):
    """Integers in floating point, exactly: every partial sum stays below 2**24 (float32) or 2**53 (float64).

    Where convolutions may be carried out by transforming their input (CUDA), they are unfolded instead.
    """

    name = "float"

    def linear_accumulators(self, x: Activation, w: Weight) -> Tensor:
        dtype = self._dtype(x, w)
        with torch.autocast(x.values.device.type, enabled=False):
            return x.levels(dtype) @ self._levels(w, dtype).t()

    def matmul_accumulators(self, a: Activation, b: Activation) -> Tensor:
        dtype = _float_dtype(matmul_bound(a, b), a.values.shape[-1])
        with torch.autocast(a.values.device.type, enabled=False):
            return a.levels(dtype) @ b.levels(dtype)

    def convolution_accumulators(self, x: Activation, w: Weight, geometry: Geometry) -> Tensor:
        dtype = self._dtype(x, w)
        with torch.autocast(x.values.device.type, enabled=False):
            if x.values.device.type == "cpu":
                convolve: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[geometry.dims]
                return convolve(x.levels(dtype), self._levels(w, dtype), None, geometry.stride, geometry.padding,
                                geometry.dilation, geometry.groups)
            return self._unfolded(x.levels(dtype), self._levels(w, dtype), geometry)

    @staticmethod
    def _unfolded(levels: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
        windows = unfold(levels, kernel.shape, geometry)
        batch, channels = windows.shape[:2]
        dims, groups, out = geometry.dims, geometry.groups, kernel.shape[0]
        spatial = windows.shape[2 : 2 + dims]
        windows = windows.reshape(batch, groups, channels // groups, *windows.shape[2:])
        windows = windows.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        matrix = windows.reshape(groups, batch * spatial.numel(), kernel[0].numel())
        acc = torch.bmm(matrix, kernel.reshape(groups, out // groups, -1).transpose(1, 2))
        acc = acc.reshape(groups, batch, *spatial, out // groups).permute(1, 0, 2 + dims, *range(2, 2 + dims))
        return acc.reshape(batch, out, *spatial)

    @staticmethod
    def _dtype(x: Activation, w: Weight) -> torch.dtype:
        return _float_dtype(w.accumulator_bound(x), w.inputs)

    @staticmethod
    def _levels(w: Weight, dtype: torch.dtype) -> Tensor:
        return w.levels.to(dtype)


def _float_dtype(bound: int, inputs: int) -> torch.dtype:
    """The floating type that holds sums up to ``bound`` exactly; :class:`OverflowBoundError` if there is none."""
    if bound >= 2**53:
        check_int32(bound, f"a layer of {inputs} inputs")
    return torch.float32 if bound < 2**24 else torch.float64


REFERENCE, ONEDNN, INT_MM, COLUMNS, FLOAT = Reference(), OneDNN(), IntMM(), ColumnSums(), FloatCarrier()
