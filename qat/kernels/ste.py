"""The straight-through estimator in closed form: quantize, linear and convolution with their backwards.

The gradient travels from layer to layer with respect to *dequantized* values, on the ``carrier`` of a
:class:`~qat.numerics.tensor.QuantizedTensor`: a float tensor with all strides 0, which owns no memory. So codes can be
passed from layer to layer in training too, and the backward keeps int8 codes and a mask instead of floats:

    dL/dx = ((g * scale_w * gain) @ levels_w) * inside(x)
    dL/dw = (gain * (g * scale_x)^T @ levels_x) * inside(w)
    dL/dscale = sum of g * ((code - zero_point) - x / scale) inside, * (bound - zero_point) outside        (LSQ)

Papers: Bengio et al. 2013 (STE); Esser et al. 2020 (LSQ); Bhalgat et al. 2020 (LSQ+); Choi et al. 2018 (PACT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.kernels import table
from qat.kernels.backends import COLUMNS
from qat.kernels.columns import added_up
from qat.kernels.contract import Activation, Geometry, Weight
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import PackedTensor, QuantizedTensor

SIGN_WINDOW = 1.25
"""Binary activations pass gradient where ``|x| <= SIGN_WINDOW * mean|x|``: one standard deviation of a Gaussian."""


@dataclass(frozen=True)
class Grid:
    """How one tensor is put on its grid, beside scale and zero point.

    Attributes:
        spec: format and granularity.
        floor, ceiling: an absorbed activation function: values are clamped here first, and pass no gradient outside.
        clipped: whether values beyond the grid's ends pass no gradient (false for weights whose range follows them).
        scale_gradient: factor on the gradient of a learned scale.
        learned: which of the learned quantizers' gradients the scale gets.
    """

    spec: TensorSpec
    floor: float | None = None
    ceiling: float | None = None
    clipped: bool = True
    scale_gradient: float = 1.0
    learned: str | None = None


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, grid: Grid,
             offset: Tensor | None = None) -> QuantizedTensor:
    """Put ``x`` on a grid; the gradient goes straight through inside of it.

    Args:
        x: floating point, any shape.
        scale: float32, shape by ``grid.spec.granularity``; gets a gradient if it is learned.
        zero_point: None, int or int32 tensor like ``scale``.
        offset: the real value of the lowest code, for ``lsq_plus``; gets a gradient.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, offset)):
        carrier, codes = _Quantize.apply(x, scale, offset, zero_point, grid)
    else:
        carrier, codes = None, _codes(x, scale, zero_point, grid)
    return QuantizedTensor(codes, scale.detach(), zero_point, grid.spec, carrier, x.dtype)


def quantize_above(x: Tensor, threshold: Tensor, scale: Tensor, grid: Grid) -> QuantizedTensor:
    """``x - threshold`` on a sign grid, in float32: +1 where ``x`` reaches the threshold, else -1.

    Args:
        threshold: float32, broadcasts against ``x``; gets the gradient ``-sum(dL/dx)`` if it is learned.
    """
    return replace(quantize(x.float() - threshold, scale, None, grid), dtype=x.dtype)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor`` on its way back."""
    return _ScaledGradient.apply(x, factor)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, grid: Grid) -> Tensor:
    if grid.ceiling is not None or (grid.floor is not None and grid.spec.fmt.signed):
        x = x.clamp(grid.floor, grid.ceiling)
    return affine.quantize(x, scale, zero_point, grid.spec)


def ghost(like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor of a shape that owns one element: it only carries a gradient."""
    return like.new_empty(()).expand(like.shape if shape is None else shape)


def quantize_marking(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, grid: Grid,
                     absorbed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Codes, and a uint8 mask of where gradient passes (None: everywhere).

    Args:
        absorbed: the lowest code is an absorbed ReLU's zero, so the codes tell themselves where it cut.
    """
    spec, fmt = grid.spec, grid.spec.fmt
    clamped = x
    if grid.ceiling is not None or (grid.floor is not None and fmt.signed):
        clamped = x.clamp(grid.floor, grid.ceiling)
    inside = None
    if grid.clipped and fmt.grid == "sign":
        size = affine.blocks(clamped.abs(), spec)
        inside = (size <= affine.aligned(scale, size, spec) * SIGN_WINDOW).view(torch.uint8).reshape(x.shape)
        codes = affine.quantize(clamped, scale, zero_point, spec)
    elif grid.clipped:
        codes, inside = affine.quantize_marking(clamped, scale, zero_point, spec, above_only=absorbed)
    else:
        codes = affine.quantize(clamped, scale, zero_point, spec)
    for end, within in ((None if absorbed else grid.floor, torch.gt), (grid.ceiling, torch.lt)):
        if end is not None:
            passes = within(x, end).view(torch.uint8)
            inside = passes if inside is None else inside.bitwise_and_(passes)
    return codes, inside


class _Quantize(torch.autograd.Function):
    """Masks are uint8, 1 where gradient passes: a multiplication by them is in place and does not branch."""

    @staticmethod
    def forward(ctx, x, scale, offset, zero_point, grid):
        fixed = not isinstance(zero_point, Tensor)
        ctx.absorbed = fixed and grid.floor == 0.0 and grid.spec.fmt.lo == (zero_point or 0)
        codes, inside = quantize_marking(x, scale, zero_point, grid, ctx.absorbed)
        ctx.grid, ctx.zero_point = grid, zero_point
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(_sparse(inside), codes if learns or ctx.absorbed else None,
                              *((x, scale, offset) if learns else (None,) * 3))
        ctx.mark_non_differentiable(codes)
        return ghost(x), codes

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        inside, codes, x, scale, offset = ctx.saved_tensors
        g_scale = g_offset = None
        if x is not None:
            g_scale, g_offset = scale_gradient(g, _dense(inside, x), x, scale, codes, offset, ctx.zero_point,
                                                ctx.grid)
        if not ctx.needs_input_grad[0]:
            return None, g_scale, g_offset, None, None
        if ctx.absorbed:  # the absorbed ReLU's mask is in the codes themselves
            lo = ctx.grid.spec.fmt.lo
            above = codes.clamp(max=1) if lo == 0 else codes.ne(lo).view(torch.uint8)
            inside = above if inside is None else _masked(above, inside)
        # a gradient that reaches a carrier is nobody else's, so it can be masked in place
        return g if inside is None else _masked(g, inside), g_scale, g_offset, None, None


def _sparse(inside: Tensor | None) -> Tensor | None:
    """A mask as what is cheapest to keep: nothing where all passes, the flat indices of a few zeros, else itself."""
    if inside is None or inside.device.type != "cpu" or torch.compiler.is_compiling():
        return inside
    if bool(inside.all()):
        return None
    if not inside.is_contiguous() or (inside.numel() - int(inside.count_nonzero())) * 64 >= inside.numel():
        return inside
    return (inside.view(-1) == 0).nonzero().squeeze(1)


def _masked(g: Tensor, inside: Tensor) -> Tensor:
    """``g`` with zeros where ``inside`` is zero, in place."""
    if inside.dtype == torch.uint8:
        return g.mul_(inside)
    if not g.is_contiguous():
        g = g.contiguous()
    return g.view(-1).index_fill_(0, inside, 0).view(g.shape)


def _dense(inside: Tensor | None, like: Tensor) -> Tensor | None:
    """The uint8 mask that :func:`_sparse` was given, in the shape of ``like``."""
    if inside is None or inside.dtype == torch.uint8:
        return inside
    mask = torch.ones(like.numel(), dtype=torch.uint8, device=like.device)
    return mask.index_fill_(0, inside, 0).view(like.shape)


def scale_gradient(g: Tensor, inside: Tensor | None, x: Tensor, scale: Tensor, codes: Tensor, offset: Tensor | None,
                    zero_point: Tensor | int | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The gradients of a learned scale and offset, summed to the shape of ``scale``."""
    spec, fmt = grid.spec, grid.spec.fmt
    values = x
    if grid.floor is not None or grid.ceiling is not None:      # what was clamped may lie inside the grid all the same
        values = x.clamp(grid.floor, grid.ceiling)
        inside = affine.quantize_marking(values, scale, zero_point, spec)[1]
    g, codes, values = (affine.blocks(t, spec) for t in (g.float(), codes, values.float()))
    inside = torch.ones((), dtype=torch.uint8, device=g.device) if inside is None else affine.blocks(inside, spec)
    shape = affine.scale_shape(x.shape, spec)

    def reduce(t: Tensor) -> Tensor:
        return affine.rows(t.reshape(x.shape), spec).sum(-1).reshape(shape) * grid.scale_gradient

    if grid.learned == "pact":
        above = (codes == fmt.hi).view(torch.uint8) * (1 - inside)
        return reduce((g * above).mul_(fmt.hi)), None
    levels = affine.blocks(affine.levels(codes.reshape(x.shape), zero_point, spec, torch.float32), spec)
    if fmt.grid == "sign":
        return reduce(levels.mul_(g)), None
    aligned = affine.aligned(scale, g, spec)
    if offset is not None:
        beta = affine.aligned(offset, g, spec)
        slope = (codes.float() - fmt.lo).sub_(((values - beta) / aligned).mul_(inside))
        return reduce(slope.mul_(g)), reduce(g * (1 - inside))
    slope = levels.mul_(fmt.unit).sub_((values / aligned).mul_(inside))
    return reduce(slope.mul_(g)), None


# --------------------------------------------------------------------------------------------- integer products


@dataclass
class Sums:
    """Accumulators of a product, with what turns them into its result.

    Attributes:
        values: whole numbers in float32, the bias included.
        step, addend: the result is ``values * step + addend``; both broadcast against ``values``; no addend: 0.
    """

    values: Tensor
    step: Tensor
    addend: Tensor | None

    def result(self) -> Tensor:
        y = self.values * self.step
        return y if self.addend is None else y.add_(self.addend)


@dataclass
class Product:
    """One integer product: operands, and how the result is rescaled.

    Attributes:
        x: the activation. ``scale``: () or, for dynamic ranges, one for each row or sample.
        w: the weight, (out, in) or (out, in // groups, *kernel). ``scale``: (), (out,) or (out, groups of inputs).
        kernel: the weight as kernels take it; None: made from ``w``. Frozen layers keep it, with its packed copies.
        gain: None, or (out,): the folded batch norm's gamma / sigma.
        geometry: None for a linear layer.
        backward_dtype: the type in which the matrix products of the backward run.
        whole_bias: add the bias to the accumulator, as whole steps; the gradient goes straight through the rounding.
        whole: what :meth:`split` returned for this bias, where it does not change.
        requantizes: keep the accumulators in ``kept``, for :mod:`qat.kernels.requantize`.
    """

    x: QuantizedTensor
    w: QuantizedTensor
    kernel: Weight | None = None
    gain: Tensor | None = None
    geometry: Geometry | None = None
    backward_dtype: torch.dtype = torch.float32
    whole_bias: bool = False
    whole: tuple[Tensor, Tensor | None] | None = None
    requantizes: bool = False
    kept: Sums | None = None

    def multiplier_w(self) -> Tensor:
        """``scale_w * unit_w * gain``: what one level of the weight is worth, float32."""
        scale = self.w.scale if self.w.spec.fmt.unit == 1.0 else self.w.scale * self.w.spec.fmt.unit
        if self.gain is None:
            return scale
        return scale * (self.gain.unsqueeze(-1) if self.w.spec.granularity == "per_group" else self.gain)

    def scale_x(self) -> Tensor:
        """``scale_x * unit_x``: what one level of the activation is worth, float32."""
        return self.x.scale if self.x.spec.fmt.unit == 1.0 else self.x.scale * self.x.spec.fmt.unit

    def step(self) -> Tensor:
        """What one step of the accumulator is worth, (out,) or (); the input has one scale."""
        return self.scale_x() * self.multiplier_w()

    def split(self, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """``whole``, or made anew: the bias in steps, and what stays outside of them; None: nothing does."""
        if self.whole is not None:
            return self.whole
        steps, outside = affine.whole_steps(bias, self.step(), self._dead())
        if torch.compiler.is_compiling() or bool(outside.any()):
            return steps, outside
        return steps, None

    def _dead(self) -> Tensor | None:
        """(out,): whether a channel's weights are all 0."""
        w = self.w
        if w.spec.fmt.grid != "affine":
            return None
        rows, point = w.codes.flatten(1), 0 if w.zero_point is None else w.zero_point
        return (rows.amax(1) == point) & (rows.amin(1) == point)

    def sums(self, bias: Tensor | None) -> Sums:
        """The accumulators with the bias in them, for :mod:`qat.kernels.requantize`."""
        steps, outside = (None, None) if bias is None else self.split(bias)
        step = self.step()
        one = torch.ones((), device=step.device)
        values = self._once(Activation.of(self.x), self.kernel or Weight.of(self.w), one, steps)
        return Sums(values, self._along_out(step) if step.dim() else step,
                    None if outside is None else self._along_out(outside))

    def forward(self, bias: Tensor | None) -> Tensor:
        """``float32(acc) * multiplier + bias`` in float32, or ``float32(acc + steps) * multiplier`` where the bias is
        whole steps; the shape of the layer's output."""
        scale_x, multiplier_w = self.scale_x(), self.multiplier_w()
        if self.whole_bias and not scale_x.dim() and self.w.spec.granularity != "per_group":
            sums = self.sums(bias)
            if self.requantizes:
                self.kept = sums
            return sums.result()
        kernel = self.kernel or Weight.of(self.w)
        if self.w.spec.granularity == "per_group":
            return self._grouped(kernel, scale_x, multiplier_w, bias)
        if scale_x.dim() == 0:
            return self._once(Activation.of(self.x), kernel, scale_x * multiplier_w, bias)
        y = self._once(Activation.of(self.x), kernel, multiplier_w, None).mul_(scale_x)
        return y if bias is None else y.add_(self._along_out(bias))

    def _once(self, x: Activation, kernel: Weight, multiplier: Tensor, bias: Tensor | None) -> Tensor:
        if self.geometry is not None:
            return table.convolution(x, kernel, self.geometry, multiplier, bias)
        shape = x.values.shape
        flat = Activation(x.values.reshape(-1, shape[-1]), _flat(x.zero_point), x.bound)
        y = table.linear(flat, kernel, multiplier, bias)  # not a view: a caller may change the output in place
        return torch.ops.aten._unsafe_view(y, (*shape[:-1], kernel.shape[0]))

    def _grouped(self, kernel: Weight, scale_x: Tensor, multiplier_w: Tensor, bias: Tensor | None) -> Tensor:
        """Integer partial sums for each group of inputs, each rescaled, and added up in float32: for few rows by
        :func:`added_up`, for many in the order of the groups."""
        x = Activation.of(self.x)
        size = self.w.spec.group_size
        assert size is not None
        assert self.geometry is None
        *lead, inputs = x.values.shape
        flat = Activation(x.values.reshape(-1, inputs), _flat(x.zero_point), x.bound)
        if len(flat.values) > table.FEW_ROWS:
            total: Tensor | None = None
            for y in self._rescaled_parts(flat, kernel, size, multiplier_w):
                total = y if total is None else total.add_(y)
            assert total is not None
        elif (kernel.lasting and COLUMNS.supports_runs(size, flat, kernel) and not torch.compiler.is_compiling()
                and not table.overridden()):
            total = COLUMNS.grouped(flat.levels(torch.float32), kernel, multiplier_w.t().contiguous(), size)
        else:
            total = added_up(torch.stack(list(self._rescaled_parts(flat, kernel, size, multiplier_w)), 1))
        total = torch.ops.aten._unsafe_view(total, (*lead, kernel.shape[0])).mul_(scale_x)
        return total if bias is None else total.add_(bias)

    def _rescaled_parts(self, x: Activation, kernel: Weight, size: int, multiplier_w: Tensor) -> Iterator[Tensor]:
        """The product of each group of inputs."""
        for i, part in enumerate(self._parts(kernel, size)):
            values = x.values[:, i * size : (i + 1) * size].contiguous()
            yield self._once(Activation(values, x.zero_point, x.bound), part, multiplier_w[:, i].contiguous(), None)

    @staticmethod
    def _parts(kernel: Weight, size: int) -> list[Weight]:
        """The weight of each group; kept, with what backends derive from it."""
        def split() -> list[Weight]:
            return [Weight(levels.contiguous(), kernel.bound) for levels in kernel.once().split(size, dim=1)]
        return kernel.cached(("parts", size), split)

    def _along_out(self, vector: Tensor) -> Tensor:
        return vector if self.geometry is None else vector.reshape(-1, *[1] * self.geometry.dims)


def _flat(zero_point: Tensor | int | None) -> Tensor | int | None:
    if isinstance(zero_point, Tensor) and zero_point.dim() > 0:
        return zero_point.reshape(-1, 1)
    return zero_point


def product(call: Product, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Run an integer product; differentiable in ``x``, ``w``, ``gain`` and ``bias`` through their carriers."""
    bias32 = None if bias is None else bias.float()
    carried = (call.x.carrier, call.w.carrier, call.gain, bias32)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in carried):
        return _Product.apply(*carried, call).to(dtype)
    return call.forward(bias32).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_carrier, w_carrier, gain, bias, call):
        # the codes go into the graph's saved tensors, which are freed as soon as this node's backward has run
        nothing = call.x.codes.new_empty(0)
        packed = isinstance(call.w, PackedTensor)       # of a frozen layer, which holds it anyway
        x = replace(call.x, codes=nothing, carrier=None)
        w = call.w if packed else replace(call.w, codes=nothing, carrier=None)
        ctx.call = replace(call, x=x, w=w, kernel=None, gain=None if gain is None else gain.detach(), kept=None)
        ctx.save_for_backward(call.x.codes, None if packed else call.w.codes)
        return call.forward(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        call, needs, (x, w) = ctx.call, ctx.needs_input_grad, ctx.saved_tensors
        call = replace(call, x=replace(call.x, codes=x), w=call.w if w is None else replace(call.w, codes=w))
        g_x, g_w = (_linear_gradients if call.geometry is None else _convolution_gradients)(call, g, needs[0], needs[1])
        g_gain = g_bias = None
        rest = [d for d in range(g.dim()) if d != (g.dim() - 1 if call.geometry is None else 1)]
        if needs[2]:
            per_gain = replace(call, gain=None).forward(None)
            g_gain = (g * per_gain).sum(rest) if rest else g * per_gain
        if needs[3]:
            g_bias = g.float().sum(rest) if rest else g.float()
        return g_x, g_w, g_gain, g_bias, None


def weight_values(call: Product, dtype: torch.dtype) -> Tensor:
    """Dequantized weight with the gain, rounded to the backward's dtype: (out, in) or (out, in // groups, *kernel)."""
    values = affine.blocks(call.w.levels(torch.float32), call.w.spec)
    scale = call.multiplier_w()
    if scale.dim():
        scale = scale.reshape(*scale.shape, *[1] * (values.dim() - scale.dim()))
    return values.mul_(scale).to(dtype).reshape(call.w.shape)


def _times_gain(g_w: Tensor, call: Product) -> Tensor:
    return g_w if call.gain is None else g_w * call.gain.reshape(-1, *[1] * (g_w.dim() - 1))


def _linear_gradients(call: Product, g: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor | None, Tensor | None]:
    dtype, g_x, g_w = call.backward_dtype, None, None
    g_low = g.to(dtype)
    if need_w:
        levels, scale = call.x.levels(dtype), call.scale_x()
        flat = (g.float() * scale).to(dtype) if scale.dim() else g_low
        flat, levels = flat.reshape(-1, flat.shape[-1]).t(), levels.reshape(-1, levels.shape[-1])
        g_w = (flat @ levels).float()
        if not scale.dim():
            g_w.mul_(scale)
        g_w = _times_gain(g_w, call)
    if need_x:
        scale = call.multiplier_w()
        if scale.dim() == 2:
            g_x = g_low @ weight_values(call, dtype)
        else:
            levels = call.w.levels(dtype)  # a fresh tensor: scaled in place
            g_x = g_low @ levels.mul_(scale.to(dtype).unsqueeze(-1) if scale.dim() else scale.to(dtype))
        g_x = g_x.to(call.x.dtype)
    return g_x, g_w


def _convolution_gradients(call: Product, g: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor | None, Tensor | None]:
    dtype, scale, geometry = call.backward_dtype, call.scale_x(), call.geometry
    assert geometry is not None
    levels = call.x.levels(dtype)
    if scale.dim():
        levels = levels * scale.to(dtype)
    weight, g_low = weight_values(call, dtype), g.to(dtype)

    def backward(x: Tensor, stride: tuple[int, ...], mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            g_low, x, weight, None, list(stride), list(geometry.padding), list(geometry.dilation), False,
            [0] * geometry.dims, geometry.groups, mask)

    if any(s > 1 for s in geometry.stride) and weight[0, 0].numel() == 1 and not any(geometry.padding):
        # torch 2.13 on CPUs corrupts memory in the weight gradient of strided convolutions with one tap
        seen = levels[(slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride))]
        g_x = backward(levels, geometry.stride, [True, False, False])[0] if need_x else None
        g_w = backward(seen, (1,) * geometry.dims, [False, True, False])[1] if need_w else None
    else:
        g_x, g_w, _ = backward(levels, geometry.stride, [need_x, need_w, False])
    if not need_w:
        g_w = None
    elif g_w is not None:
        g_w = _times_gain(g_w.float() if scale.dim() else g_w.float().mul_(scale), call)
    return (g_x.to(call.x.dtype) if need_x and g_x is not None else None), g_w


# ------------------------------------------------------------------------------------- shape changes of codes


class _Rearranged(torch.autograd.Function):
    """The carrier of rearranged codes: its gradient is arranged back."""

    @staticmethod
    def forward(ctx, carrier, shape, back):
        ctx.back = back
        return ghost(carrier, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.back(g), None, None


def rearranged(x: QuantizedTensor, codes: Tensor, back: Callable[[Tensor], Tensor], scale: Tensor | None = None,
               zero_point: Tensor | int | None = None) -> QuantizedTensor:
    """``x`` with its codes rearranged into ``codes``; ``back`` maps a gradient of the new shape to the old one.

    Per-tensor scales are left alone by that; others, and their zero points, have to be given anew, in shapes that
    broadcast against the codes.
    """
    carrier = None
    if x.carrier is not None and torch.is_grad_enabled():
        carrier = _Rearranged.apply(x.carrier, codes.shape, back)
    if scale is None:
        return replace(x, codes=codes, carrier=carrier)
    return replace(x, codes=codes, carrier=carrier, scale=scale, zero_point=zero_point)


def transposed(x: QuantizedTensor) -> QuantizedTensor:
    """``x`` with its last two dimensions exchanged, scales for each row or column included."""
    def turn(t: Tensor) -> Tensor:
        return t.transpose(-1, -2)

    if not x.scale.dim():
        return rearranged(x, turn(x.codes), turn)
    zero_point = turn(x.zero_point) if isinstance(x.zero_point, Tensor) else x.zero_point
    return rearranged(x, turn(x.codes), turn, turn(x.scale), zero_point)
